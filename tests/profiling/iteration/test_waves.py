"""Waves: each program once, each point after its programs, and the points that cost least compilation first."""

import collections

import hypothesis
import hypothesis.strategies as st
import pytest

from loongjax.costmodel.work import Strategy
from loongjax.runtime.buckets import Buckets
from loongjax.runtime.program_calls import ProgramKey
from loongjax_profiling.iteration.case import Case
from loongjax_profiling.iteration.grids import build_grid
from loongjax_profiling.iteration.waves import programs_of, waves_of

BUCKETS = Buckets.for_limits(max_num_batched_tokens=1 << 30, max_num_seqs=1024, num_pages=1000)
ALL_CASES = build_grid("analytical-model", num_devices=4).cases


def needs(case):
    return programs_of(case, BUCKETS)


@hypothesis.given(
    st.lists(st.lists(st.sampled_from(ALL_CASES), unique=True, max_size=12), max_size=4), st.integers(1, 8)
)
@hypothesis.settings(max_examples=20, deadline=None)
def test_every_case_comes_once_in_its_pass_and_every_program_once_and_before(passes, size):
    known = set()
    passes = [[case for case in cases if not (case in known or known.add(case))] for cases in passes]
    compiled, measured = [], []
    for wave in waves_of(passes, needs, lambda case: case.num_tokens, size=size):
        compiled += wave.programs
        measured += wave.cases
        assert len(wave.programs) <= max(size, 3)
        assert all(key in compiled for case in wave.cases for key in needs(case))
    assert len(compiled) == len(set(compiled))
    begin = 0
    for cases in passes:
        assert collections.Counter(measured[begin : begin + len(cases)]) == collections.Counter(cases)
        begin += len(cases)
    assert begin == len(measured)


def test_the_first_wave_pays_for_more_points_than_it_has_programs():
    grid = build_grid("analytical-model", num_devices=2)
    cases = [[case for case in cases if case.strategy.tp == 1] for cases in grid.passes]
    waves = list(waves_of(cases, needs, lambda case: case.num_tokens))
    assert len(waves[0].cases) > 2 * len(waves[0].programs)
    assert {(case.kind, case.strategy) for case in waves[0].cases} == {
        ("prefill", Strategy(1)),
        ("prefill", Strategy(2)),
        ("decode", Strategy(1)),
        ("decode", Strategy(2)),
        ("migration", Strategy(2)),
    }


def test_the_program_that_serves_most_points_comes_first():
    rare = Case(kind="decode", strategy=Strategy(1), batch_size=1, input_len=10, num_masters=1)
    frequent = [
        Case(kind="decode", strategy=Strategy(1), batch_size=16, input_len=length, num_masters=1)
        for length in (10, 100, 1000)
    ]
    [first, second] = waves_of([[rare, *frequent]], needs, lambda case: case.num_tokens, size=2)
    assert first.cases == tuple(frequent)
    assert second.cases == (rare,)


@pytest.mark.parametrize(
    ("case", "keys"),
    [
        (
            Case(kind="prefill", strategy=Strategy(2), batch_size=9, input_len=100),
            # 450 tokens on a rank, of which one samples 5 rows.
            (ProgramKey("prefill", 2, 512), ProgramKey("head", 2, 16), ProgramKey("sample", 2, 16)),
        ),
        (
            Case(kind="decode", strategy=Strategy(4, 2), batch_size=9, input_len=100, num_masters=2),
            (ProgramKey("decode", 4, 16), ProgramKey("sample", 4, 16)),
        ),
        (Case(kind="migration", strategy=Strategy(2), input_len=100), (ProgramKey("migrate", 2),)),
    ],
)
def test_programs_are_those_of_the_buckets(case, keys):
    assert needs(case) == keys
