"""What is kept of each request of a benchmark, simulated or real: one JSON object a line."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from loongjax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RequestRecord:
    """The life of one request as its client saw it. Times are in seconds since the benchmark began."""

    request_id: str
    prompt_len: int
    """Tokens of the prompt."""
    output_len: int
    """Tokens generated."""
    issue_s: float
    """When it was sent."""
    first_token_s: float | None
    """When its first token came; None: it ended without one."""
    complete_s: float
    """When it ended."""
    ttft_slo_s: float | None = None
    """Time to the first token that was wished for; None: no wish."""
    tpot_slo_s: float | None = None
    """Time per output token that was wished for; None: no wish."""
    error: str | None = None
    """Why it failed, or was refused."""

    @property
    def ttft_s(self) -> float | None:
        """Time to first token; None without one."""
        return None if self.first_token_s is None else self.first_token_s - self.issue_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first, 0 of a single token; None without a token."""
        if self.first_token_s is None:
            return None
        return (self.complete_s - self.first_token_s) / (self.output_len - 1) if self.output_len > 1 else 0.0

    @property
    def latency_s(self) -> float:
        return self.complete_s - self.issue_s

    @property
    def meets_slo(self) -> bool:
        """Whether it succeeded and got all that was wished for."""
        ttft_s, tpot_s = self.ttft_s, self.tpot_s
        if self.error is not None or ttft_s is None or tpot_s is None:
            return False
        is_prompt = self.ttft_slo_s is None or ttft_s <= self.ttft_slo_s
        return is_prompt and (self.tpot_slo_s is None or tpot_s <= self.tpot_slo_s)


_DERIVED = ("ttft_s", "tpot_s", "latency_s")


def write_records(records: Iterable[RequestRecord], path: pathlib.Path) -> None:
    """One JSON object a line: the fields, and `ttft_s`, `tpot_s` and `latency_s` for those who read no Python."""
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            derived = {name: getattr(record, name) for name in _DERIVED}
            file.write(json.dumps(dataclasses.asdict(record) | derived) + "\n")


def read_records(path: pathlib.Path) -> list[RequestRecord]:
    """What `write_records` wrote.

    Raises:
        ConfigError: no such file, or a line that is no record; the message names it.
    """
    names = [field.name for field in dataclasses.fields(RequestRecord)]
    return [
        RequestRecord(**{name: row[name] for name in names})
        for row in read_json_lines(path, required=(*names, *_DERIVED)).values()
    ]


def read_json_lines(path: pathlib.Path, *, required: Sequence[str]) -> dict[int, dict[str, Any]]:
    """The objects of a JSON-lines file by the numbers of their lines, each with at least these fields.

    Empty lines are passed over.

    Raises:
        ConfigError: as `read_records`.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    rows = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}, line {number} is no JSON: {error}") from None
        missing = [name for name in required if not isinstance(row, dict) or name not in row]
        if missing:
            raise ConfigError(f"{path}, line {number} lacks {', '.join(missing)}")
        rows[number] = row
    return rows
