"""Runs cases and lays their rows out as a table."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from tqdm import tqdm

from loongjax_profiling.kernels.case import Case, Row
from loongjax_profiling.kernels.timing import device_seconds

logger = logging.getLogger(__name__)

EXPECTED = {"gpu": {"B": 4e12, "FLOP": 5e14}, "cpu": {"B": 1e8, "FLOP": 1e10}}
"""A second, by platform: only to guess how many repetitions are long enough to time."""
TARGET_S = 0.01
MAX_REPETITIONS = 64


def measure(cases: Sequence[Case]) -> list[Row]:
    """One row a case, with a progress bar. What fails becomes a row that says why, and the rest goes on."""
    return [_measure(case) for case in tqdm(cases, desc="Kernels", unit="case", disable=None)]


def _measure(case: Case) -> Row:
    names: dict[str, Any] = {"op": case.op, "work": case.work, "variant": case.variant, "unit": case.unit}
    expected = EXPECTED["gpu" if jax.default_backend() == "gpu" else "cpu"][case.unit]
    repetitions = max(2, min(MAX_REPETITIONS, round(TARGET_S * expected / case.amount)))
    try:
        seconds = device_seconds(case.build(), repetitions)
    except Exception as error:
        logger.warning("%s, %s, %s: %s", case.op, case.work, case.variant, error)
        return Row(**names, error=f"{type(error).__name__}: {error}"[:300])
    if seconds <= 0.0:
        return Row(**names, error="too short to be timed")
    return Row(**names, seconds=seconds, rate=case.amount / seconds)


def format_table(rows: Iterable[Row], copy_rate: float) -> str:
    """A line a row; bytes are compared with the copy, operations with cuDNN's of the same work where there are some."""
    rows = list(rows)
    rivals = {(row.op, row.work): row for row in rows if row.rate is not None and row.variant == "cudnn"}
    lines = [f"{'op':18} {'work':42} {'variant':11} {'time':>12} {'rate':>15}  beside"]
    for row in rows:
        if row.seconds is None or row.rate is None:
            lines.append(f"{row.op:18} {row.work:42} {row.variant:11} {row.error}")
            continue
        rate = format_rate(row.rate, row.unit)
        rival = rivals.get((row.op, row.work))
        beside = ""
        if row.unit == "B":
            beside = f"{row.rate / copy_rate:.1%} of a copy"
        elif rival is not None and rival.rate is not None and rival is not row:
            beside = f"{row.rate / rival.rate:.1%} of {rival.variant}"
        time = f"{row.seconds * 1e6:.1f} us"
        lines.append(f"{row.op:18} {row.work:42} {row.variant:11} {time:>12} {rate:>15}  {beside}".rstrip())
    return "\n".join(lines)


def format_rate(rate: float, unit: str) -> str:
    """In tera, or giga where there is less."""
    factor, prefix = (1e12, "T") if rate >= 1e12 else (1e9, "G")
    return f"{rate / factor:.2f} {prefix}{unit}/s"


def to_json(result: dict[str, Any], rows: Iterable[Row]) -> str:
    """The provenance, and one line a row."""
    lines = ",\n  ".join(json.dumps({k: v for k, v in vars(row).items() if v is not None}) for row in rows)
    head = json.dumps(result, indent=1).removesuffix("\n}")
    return f'{head},\n "rows": [\n  {lines}\n ]\n}}\n'
