"""Mooncake's traces of a production service: their file format, and lengths like theirs."""

from __future__ import annotations

import dataclasses
import math
import pathlib

import numpy as np

from loongjax.errors import ConfigError
from loongjax_profiling.records import read_json_lines
from loongjax_profiling.simulate.workload.lengths import Lengths, Quantiles
from loongjax_profiling.simulate.workload.request import WorkloadRequest

PROMPT = Quantiles(((0.0, 890), (0.1, 1_300), (0.5, 7_300), (0.9, 27_000), (0.99, 87_000), (1.0, 126_000)))
OUTPUT = Quantiles(((0.0, 1), (0.1, 40), (0.5, 355), (0.9, 600), (0.99, 930), (1.0, 2_000)))


@dataclasses.dataclass(frozen=True)
class MooncakeLengths:
    """Like Mooncake's conversation trace: an hour of 12,031 requests, of 12K and 343 tokens on average.

    Through rough percentiles of its first minute; means here are 13.2K and 326.
    """

    def sample(self, count: int, random: np.random.Generator) -> Lengths:
        """See `LengthDistribution.sample`."""
        return Lengths(PROMPT.sample(count, random), OUTPUT.sample(count, random))


def read_mooncake(path: pathlib.Path, *, speed: float = 1.0, max_requests: int | None = None) -> list[WorkloadRequest]:
    """A trace in Mooncake's JSON-lines format.

    Each line has `timestamp` (milliseconds since the trace began), `input_length` and `output_length` (tokens), and
    `hash_ids` (ids of the prompt's blocks of 512 tokens, equal where prompts share a prefix), which are not used:
    nothing is shared here. An output of 0 tokens counts as 1.

    Args:
        path: the file.
        speed: how many times faster than recorded it is played.
        max_requests: leaves out all after so many; None: none.

    Raises:
        ConfigError: no such file, or a line that is not of this format.
    """
    if not 0.0 < speed < math.inf:
        raise ConfigError(f"a trace is played at a speed above 0, got {speed}: 1 is as recorded")
    rows = read_json_lines(path, required=("timestamp", "input_length", "output_length"))[:max_requests]
    requests = []
    for index, row in enumerate(rows, start=1):
        try:
            request = WorkloadRequest(
                arrival_s=_number(row["timestamp"], "a timestamp is a number of milliseconds") / 1000.0 / speed,
                prompt_len=_num_tokens(row["input_length"]),
                output_len=max(1, _num_tokens(row["output_length"])),
            )
        except (ConfigError, OverflowError, ValueError) as error:
            raise ConfigError(f"{path}, request {index}: {error}") from None
        requests.append(request)
    if not requests:
        raise ConfigError(f"{path} holds no request")
    return sorted(requests, key=lambda request: request.arrival_s)


def _num_tokens(value: object) -> int:
    """A whole number that is not negative; anything else is a ValueError."""
    said = "a number of tokens is a whole number"
    number = _number(value, said)
    if number < 0 or number != number // 1:
        raise ValueError(f"{said}, got {value!r}")
    return int(number)


def _number(value: object, said: str) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{said}, got {value!r}")
    return value
