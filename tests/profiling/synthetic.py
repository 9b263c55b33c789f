"""Databases of points whose times are known."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path

from loongjax.costmodel.work import DecodeTotals, Strategy
from loongjax_profiling.iteration.case import Case
from loongjax_profiling.iteration.database import Database, Point, Run, System
from loongjax_profiling.iteration.meter import Timing
from loongjax_profiling.iteration.placement import masters_of
from loongjax_profiling.iteration.selection import decode_work
from tests.costmodel.shapes import LLAMA2_7B, MIGRATION, PADDING, decode, refined

H200 = System(device="NVIDIA H200", model=LLAMA2_7B)
RUN = Run(
    num_devices=4,
    model_name="llama2-7b, random weights",
    commit="0123abc",
    jax="0.11.2",
    command="loongjax profile iteration",
    page_size=16,
    padding=PADDING,
)


def timed(case: Case) -> Timing:
    """What an engine takes that has the coefficients of `tests.costmodel.shapes`; decodes with even keys."""
    sp = case.strategy.sp
    if case.kind in ("prefill", "extend"):
        totals = case.prefill_work.totals
        # Retention's copies, of a hundredth.
        seconds = refined(sp).seconds(totals).item() * (1.01 if case.scales_down else 1.0)
        return Timing(seconds=seconds, stddev_s=0.0, num_rounds=3)
    if case.kind == "migration":
        seconds = MIGRATION.seconds(case.input_len, LLAMA2_7B, case.strategy.tp)
        return Timing(seconds=seconds, stddev_s=0.0, num_rounds=3)
    assert len(masters_of(case)) == case.batch_size
    keys = (case.batch_size * (case.input_len + 10) // sp + 1,) * sp
    timing = Timing(seconds=1.0, stddev_s=0.0, num_rounds=16, keys=keys)
    seconds = decode(sp).seconds(DecodeTotals.of([decode_work(case, timing)])).item()
    return dataclasses.replace(timing, seconds=seconds)


def make_database(
    path: Path,
    cases: Iterable[Case],
    *,
    system: System = H200,
    run: Run = RUN,
    time: Callable[[Case], Timing] = timed,
) -> Path:
    """Adds a run with these cases to a file."""
    with Database(path, create=True) as database:
        run_id = database.begin_run(system, run)
        for case in cases:
            database.add(run_id, Point(case=case, timing=time(case)))
    return path


def model_cases(strategies: Iterable[Strategy]) -> list[Case]:
    """Enough to fit: prefills, decodes and migrations of all scales."""
    cases = []
    for strategy in strategies:
        for batch_size in (1, 3, 16, 40):
            for input_len in (10, 100, 700, 3000, 20_000, 90_000):
                work = {"strategy": strategy, "batch_size": batch_size, "input_len": input_len}
                cases.append(Case(kind="prefill", **work))
                for num_masters in {1, min(batch_size, strategy.sp)}:
                    cases.append(Case(kind="decode", num_masters=num_masters, **work))
        if strategy.sp == 2:
            lens = (16, 256, 4096, 65_536, 100_000)
            cases += [Case(kind="migration", strategy=strategy, input_len=length) for length in lens]
    return cases
