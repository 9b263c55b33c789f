"""Waves: each point once and in its pass, and those that cost least compilation first."""

import collections
import itertools

import hypothesis
import hypothesis.strategies as st
import pytest

from loongjax.costmodel.work import Strategy
from loongjax.runtime.buckets import Buckets
from loongjax.runtime.program_calls import ProgramKey
from loongjax_profiling.iteration.case import Case
from loongjax_profiling.iteration.grids import build_grid
from loongjax_profiling.iteration.waves import compile_cost, programs_of, waves_of

BUCKETS = Buckets.for_limits(max_num_batched_tokens=1 << 30, max_num_seqs=1024, num_pages=1000)
ALL_CASES = build_grid("analytical-model", num_devices=4).cases


def needs(case):
    return programs_of(case, BUCKETS)


def num_tokens(case):
    return case.num_tokens


@hypothesis.given(
    st.lists(st.lists(st.sampled_from(ALL_CASES), unique=True, max_size=12), max_size=4),
    st.lists(st.integers(1, 8), min_size=1, max_size=5),
)
@hypothesis.settings(max_examples=20, deadline=None)
def test_every_case_comes_once_in_its_pass_and_waves_need_no_more_than_asked_for(passes, widths):
    known = set()
    passes = [[case for case in cases if not (case in known or known.add(case))] for cases in passes]
    asked = []

    def width():
        asked.append(widths[len(asked) % len(widths)])
        return asked[-1]

    compiled, measured = set(), []
    for wave in waves_of(passes, needs, num_tokens, width=width):
        most = asked[-1]
        assert list(map(num_tokens, wave)) == sorted(map(num_tokens, wave))
        new = set(itertools.chain.from_iterable(map(needs, wave))) - compiled
        first = min(compile_cost(set(needs(case)) - compiled) for case in wave)
        assert compile_cost(new) <= max(most, first + 1.2) + 1e-9
        compiled |= new
        measured += wave
    begin = 0
    for cases in passes:
        assert collections.Counter(measured[begin : begin + len(cases)]) == collections.Counter(cases)
        begin += len(cases)
    assert begin == len(measured)


def test_the_first_wave_pays_for_more_points_than_it_has_programs():
    grid = build_grid("analytical-model", num_devices=2)
    passes = [[case for case in cases if case.strategy.tp == 1] for cases in grid.passes]
    wave = next(waves_of(passes, needs, num_tokens, width=lambda: 16))
    assert len(wave) > 2 * len(set(itertools.chain.from_iterable(map(needs, wave))))
    assert {(case.kind, case.strategy) for case in wave} == {
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
    [first, second] = waves_of([[rare, *frequent]], needs, num_tokens, width=lambda: 1)
    assert first == tuple(frequent)
    assert second == (rare,)


def test_points_whose_model_program_is_there_come_before_the_next_one():
    alone = Case(kind="prefill", strategy=Strategy(1), batch_size=1, input_len=60)
    batched = Case(kind="prefill", strategy=Strategy(1), batch_size=4, input_len=15)
    decode = Case(kind="decode", strategy=Strategy(1), batch_size=1, input_len=10, num_masters=1)
    # The decode shares the sampler of one row with the prefill, the batch its model program.
    waves = list(waves_of([[alone, decode, batched]], needs, num_tokens, width=lambda: 1))
    order = list(itertools.chain.from_iterable(waves))
    assert abs(order.index(alone) - order.index(batched)) == 1


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
        (
            Case(kind="extend", strategy=Strategy(1), batch_size=2, input_len=60, past_len=9, num_decodes=10),
            # 130 tokens of 12 requests.
            (ProgramKey("extend", 1, 256, 16), ProgramKey("head", 1, 16), ProgramKey("sample", 1, 16)),
        ),
    ],
)
def test_programs_are_those_of_the_buckets(case, keys):
    assert needs(case) == keys
