"""Mooncake's traces of a production service: their file format, and lengths like theirs."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable

import numpy as np

from loongjax.errors import ConfigError
from loongjax_profiling.records import read_json_lines
from loongjax_profiling.simulate.workload.arrivals import LONGEST_S
from loongjax_profiling.simulate.workload.lengths import Lengths, Quantiles
from loongjax_profiling.simulate.workload.request import WorkloadRequest

PROMPT = Quantiles(((0.0, 890), (0.1, 1_300), (0.5, 7_300), (0.9, 27_000), (0.99, 87_000), (1.0, 126_000)))
OUTPUT = Quantiles(((0.0, 1), (0.1, 40), (0.5, 355), (0.9, 600), (0.99, 930), (1.0, 2_000)))

CALENDAR_MS = 86_400_000
"""No trace says nothing for its first day: timestamps beyond it have another origin than the trace's begin."""


@dataclasses.dataclass(frozen=True)
class MooncakeLengths:
    """Like Mooncake's conversation trace: an hour of 12,031 requests, of 12K and 343 tokens on average.

    Through rough percentiles of its first minute; means here are 13.2K and 326.
    """

    def sample(self, count: int, random: np.random.Generator) -> Lengths:
        """See `LengthDistribution.sample`."""
        return Lengths(PROMPT.sample(count, random), OUTPUT.sample(count, random))


def read_mooncake(path: pathlib.Path, *, speed: float = 1.0) -> list[WorkloadRequest]:
    """A trace in Mooncake's JSON-lines format: its requests in order of arrival, whatever their order in the file.

    Each line has `timestamp` (milliseconds since the trace began), `input_length` and `output_length` (tokens), and
    `hash_ids` (ids of the prompt's blocks of 512 tokens, equal where prompts share a prefix), which are not used:
    nothing is shared here. An output of 0 tokens counts as 1. Timestamps of which the earliest is beyond a day are
    taken for times of a calendar, and counted from the earliest.

    Args:
        path: the file.
        speed: how many times faster than recorded it is played.

    Raises:
        ConfigError: no such file, a line that is not of this format, or arrivals over so long a time that a clock
            cannot tell them apart; the message names the line.
    """
    if not 0.0 < speed < math.inf:
        raise ConfigError(f"a trace is played at a speed above 0, got {speed}: 1 is as recorded")
    rows = read_json_lines(path, required=("timestamp", "input_length", "output_length"))
    if not rows:
        raise ConfigError(f"{path} holds no request")
    times_ms = {number: _read(_milliseconds, row["timestamp"], path, number) for number, row in rows.items()}
    first_ms = min(times_ms.values())
    begin_ms = first_ms if first_ms > CALENDAR_MS else 0
    requests = []
    for number, row in rows.items():
        arrival_s = (times_ms[number] - begin_ms) / 1000.0 / speed
        if not arrival_s <= LONGEST_S:
            raise ConfigError(
                f"{path}, line {number}: {times_ms[number]:g} ms, the earliest being {first_ms:g}, is more than "
                f"{LONGEST_S:g} s into the trace at a speed of {speed:g}: timestamps are in milliseconds"
            )
        requests.append(
            WorkloadRequest(
                arrival_s=arrival_s,
                prompt_len=_read(_prompt_len, row["input_length"], path, number),
                output_len=max(1, _read(_num_tokens, row["output_length"], path, number)),
            )
        )
    return sorted(requests, key=lambda request: request.arrival_s)


def _read[Read](read: Callable[[object], Read], value: object, path: pathlib.Path, line: int) -> Read:
    """Raises ConfigError, which names the line, for a value that this reader refuses."""
    try:
        return read(value)
    except (OverflowError, ValueError) as error:
        raise ConfigError(f"{path}, line {line}: {error}") from None


def _milliseconds(value: object) -> int | float:
    """A timestamp, as exact as it was; anything else is a ValueError, or OverflowError."""
    number = _number(value, "a timestamp is a number of milliseconds")
    if not 0.0 <= float(number) < math.inf:
        raise ValueError(f"a timestamp is finite and not negative, got {value!r}")
    return number


def _prompt_len(value: object) -> int:
    """As `_num_tokens`, and not 0."""
    number = _num_tokens(value)
    if number < 1:
        raise ValueError("a prompt has at least one token, got 0")
    return number


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
