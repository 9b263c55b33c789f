"""Runs cases and lays their rows out as a table, each beside what it is compared with and its target."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import json
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from tqdm import tqdm

from loongjax_profiling.kernels.case import Case, Comparison, Repeat, Row, as_record
from loongjax_profiling.kernels.device_trace import DeviceTimes, device_times
from loongjax_profiling.kernels.timing import SlopeTimer, sample_in_turn

logger = logging.getLogger(__name__)

EXPECTED = {"gpu": {"B": 4e12, "FLOP": 5e14}, "cpu": {"B": 1e8, "FLOP": 1e10}}
"""A second, by platform: only to guess how many repetitions are long enough to time."""
TARGET_S = 0.01
MAX_REPETITIONS = 64
MIN_TRACED_REPETITIONS = 8
EXCHANGE_TRACES = 3
"""In turn with the rivals': exchanges vary most."""
SAMPLES = 5
SAMPLING_S = 4.0
"""After which a group of variants gets no more samples than the fewest."""


def measure(cases: Sequence[Case]) -> Iterator[Row]:
    """One row a case, as they come, with a progress bar. What fails becomes a row that says why, and the rest goes on.

    Variants that do the same work, next to each other in `cases`, are compiled beside each other and timed in turn.
    """
    with (
        tqdm(total=len(cases), desc="Kernels", unit="case", disable=None) as bar,
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):
        for _, group in itertools.groupby(cases, lambda case: (case.op, case.work)):
            # Data are made here: a program's first run may not fall into the time in which another thread records one.
            rows = _measure(list(pool.map(_compile, [_plan(case) for case in group])))
            bar.update(len(rows))
            yield from rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A case that is ready to be timed, or the row of one that is not."""

    case: Case
    repetitions: int
    is_traced: bool
    repeat: Repeat | None = None
    failed: Row | None = None


def _plan(case: Case) -> Program:
    """On a GPU what moves bytes is traced, as the copy is timed by events: slopes hold launches, and those of several
    devices take a host longer than an exchange takes the devices."""
    is_gpu = jax.default_backend() == "gpu"
    expected_s = case.amount / EXPECTED["gpu" if is_gpu else "cpu"][case.unit]
    repetitions = max(2, min(MAX_REPETITIONS, round(TARGET_S / expected_s)))
    is_traced = is_gpu and case.unit == "B"
    program = Program(
        case=case,
        repetitions=max(MIN_TRACED_REPETITIONS, repetitions) if is_traced else repetitions,
        is_traced=is_traced,
    )
    try:
        return dataclasses.replace(program, repeat=case.build())
    except Exception as error:
        return dataclasses.replace(program, failed=_failure(case, error))


def _compile(program: Program) -> Program:
    if program.repeat is None:
        return program
    try:
        program.repeat(program.repetitions)
    except Exception as error:
        return dataclasses.replace(program, repeat=None, failed=_failure(program.case, error))
    return program


def _failure(case: Case, error: Exception) -> Row:
    logger.warning("%s, %s, %s: %s", case.op, case.work, case.variant, error)
    return Row(case=case, error=f"{type(error).__name__}: {error}"[:300])


def _measure(programs: Sequence[Program]) -> list[Row]:
    """Of the same work."""
    rows = {i: program.failed for i, program in enumerate(programs) if program.failed is not None}
    timers: dict[int, SlopeTimer] = {}
    traces: dict[int, list[DeviceTimes]] = {}
    for number, (i, program) in itertools.product(range(EXCHANGE_TRACES), enumerate(programs)):
        if program.repeat is None or i in rows or (number > 0 and not program.case.is_exchange):
            continue
        try:
            if program.is_traced:
                traces.setdefault(i, []).append(device_times(program.repeat, program.repetitions))
            elif number == 0:
                timers[i] = SlopeTimer(program.repeat, program.repetitions)
        except Exception as error:
            rows[i] = _failure(program.case, error)
    for i, times in traces.items():
        if i not in rows:
            median = sorted(times, key=lambda times: times.period_s)[len(times) // 2]
            rows[i] = Row(case=programs[i].case, seconds=median.period_s, method="trace", kernels=median.kernel_s)
    sample_in_turn(list(timers.values()), SAMPLES, enough_s=SAMPLING_S)
    for i, timer in timers.items():
        if timer.seconds <= 0.0:
            rows[i] = Row(case=programs[i].case, error="too short to be timed")
        else:
            rows[i] = Row(case=programs[i].case, seconds=timer.seconds, method="slope")
    return [rows[i] for i in range(len(programs))]


def compare(rows: Sequence[Row], copy_rate: float) -> list[Comparison | None]:
    """With the fastest rival at the same work, or else bytes with the copy and operations with the row's baseline."""
    return [_compare(row, rows, copy_rate) for row in rows]


def _compare(row: Row, rows: Sequence[Row], copy_rate: float) -> Comparison | None:
    case, rate = row.case, row.rate
    if rate is None or case.is_rival:
        return None
    rivals = [
        (other.rate, other.case.variant)
        for other in rows
        if other.rate is not None and other.case.is_rival and (other.case.op, other.case.work) == (case.op, case.work)
    ]
    baselines = [
        (other.rate, other.case.work)
        for other in rows
        if other.rate is not None
        and other.case.op == case.op
        and (other.case.work, other.case.variant) == case.baseline
    ]
    for compared in (rivals, baselines):
        if compared:
            best, name = max(compared)
            return Comparison(share=rate / best, beside=name)
    return Comparison(share=rate / copy_rate, beside="a copy") if case.unit == "B" and not case.is_exchange else None


def format_table(rows: Sequence[Row], copy_rate: float) -> str:
    """A line a row."""
    lines = [f"{'op':18} {'work':46} {'variant':20} {'time':>12} {'rate':>15}  {'target':11} beside"]
    for row, comparison in zip(rows, compare(rows, copy_rate), strict=True):
        case = row.case
        names = f"{case.op:18} {case.work:46} {case.variant:20}"
        if row.seconds is None or row.rate is None:
            lines.append(f"{names} {row.error}")
            continue
        beside = "" if comparison is None else f"{comparison.share:.1%} of {comparison.beside}"
        time = f"{row.seconds * 1e6:.1f} us"
        line = f"{names} {time:>12} {format_rate(row.rate, case.unit):>15}  {format_target(case):11} {beside}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def format_target(case: Case) -> str:
    """Empty if the case has none."""
    if case.most_seconds is not None:
        return f"<= {case.most_seconds * 1e6:.0f} us"
    return "" if case.least_share is None else f">= {case.least_share:.0%}"


def format_rate(rate: float, unit: str) -> str:
    """In tera, or giga where there is less."""
    factor, prefix = (1e12, "T") if rate >= 1e12 else (1e9, "G")
    return f"{rate / factor:.2f} {prefix}{unit}/s"


def to_json(result: dict[str, Any], rows: Sequence[Row], copy_rate: float) -> str:
    """The provenance, and one line a row."""
    records = (as_record(row, comparison) for row, comparison in zip(rows, compare(rows, copy_rate), strict=True))
    lines = ",\n  ".join(map(json.dumps, records))
    head = json.dumps(result, indent=1).removesuffix("\n}")
    return f'{head},\n "rows": [\n  {lines}\n ]\n}}\n'
