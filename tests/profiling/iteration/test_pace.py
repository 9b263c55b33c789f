"""The pace of compilation: against a model of a machine, points never come much later than one by one."""

import functools
import itertools
import math

import pytest

from loongjax.runtime.buckets import Buckets
from loongjax_profiling.iteration.grids import build_grid
from loongjax_profiling.iteration.pace import COMPILE_SHARE, CompilePace
from loongjax_profiling.iteration.waves import compile_cost, programs_of, waves_of

BUCKETS = Buckets.for_limits(max_num_batched_tokens=2048, max_num_seqs=256, num_pages=1000)
PROGRAM_S, POINT_S = 5.0, 0.2


@functools.cache
def needs(case):
    return programs_of(case, BUCKETS)


def fits(case):
    return case.strategy.tp == 1 and case.batch_size <= 256 and case.num_tokens <= 2048 * case.strategy.sp


def ends_of_points(num_devices, width, note, speedup):
    """When each point ends on a machine that compiles programs side by side so many times faster than alone."""
    grid = build_grid("analytical-model", num_devices=num_devices, shrink=256)
    passes = [list(filter(fits, cases)) for cases in grid.passes[:2]]
    now_s, ends, compiled = 0.0, [], set()
    for wave in waves_of(passes, needs, lambda case: case.num_tokens, width=width):
        new = set(itertools.chain.from_iterable(map(needs, wave))) - compiled
        compiled |= new
        longest = max((compile_cost([key]) for key in new), default=0.0)
        seconds = PROGRAM_S * max(longest, compile_cost(new) / speedup)
        note(compile_cost(new), seconds)
        now_s += seconds
        for _ in wave:
            now_s += POINT_S
            ends.append(now_s)
    return ends


@functools.cache
def one_by_one(num_devices):
    return ends_of_points(num_devices, lambda: 0.0, lambda *_: None, 1.0)


def paced(num_devices, num_threads, speedup):
    pace = CompilePace(num_threads)
    return ends_of_points(num_devices, lambda: pace.width(math.inf), pace.note, speedup)


@pytest.mark.parametrize("num_devices", [1, 8])
@pytest.mark.parametrize(("num_threads", "speedup"), [(2, 2.0), (16, 4.0), (16, 16.0)])
def test_where_threads_help_no_point_comes_later_than_one_by_one(num_devices, num_threads, speedup):
    ends = paced(num_devices, num_threads, speedup)
    assert all(end <= alone + 1e-6 for end, alone in zip(ends, one_by_one(num_devices), strict=True))


@pytest.mark.parametrize("num_devices", [1, 8])
@pytest.mark.parametrize("num_threads", [2, 16])
def test_where_threads_do_not_help_points_come_less_than_twice_as_late(num_devices, num_threads):
    ends = paced(num_devices, num_threads, speedup=1.0)
    assert all(end < 2.0 * alone for end, alone in zip(ends, one_by_one(num_devices), strict=True))


def test_many_threads_that_help_measure_a_pass_in_a_third_of_the_time():
    assert paced(8, 16, speedup=16.0)[399] < one_by_one(8)[399] / 3.0


def test_width_doubles_up_to_the_threads_with_each_wave_that_used_it():
    pace = CompilePace(8)
    widths = []
    for cost in (0.2, 1.2, 2.0, 0.4, 4.0, 8.0, 8.0):
        widths.append(pace.width(math.inf))
        pace.note(cost, 1.0)
    assert widths == [1.0, 1.0, 2.0, 4.0, 4.0, 8.0, 8.0]


def test_what_a_wave_takes_is_expected_of_the_next():
    pace = CompilePace(8)
    assert pace.expected_s(5.0) == 0.0
    pace.note(1.0, 6.0)
    assert pace.expected_s(2.0) == pytest.approx(12.0)
    pace.note(4.0, 8.0)
    assert pace.expected_s(4.0) == pytest.approx(8.0)
    assert pace.expected_s(1.0) == pytest.approx(6.0), "fewer programs than threads take as long as one"
    assert pace.expected_s(0.1) == pytest.approx(0.6)


def test_a_wave_is_as_wide_as_the_time_left_pays_for():
    pace = CompilePace(8)
    for cost in (1.0, 2.0, 4.0, 8.0):
        pace.note(cost, 2.0 * cost)
    assert pace.width(100.0) == 8.0
    assert pace.width(10.0) == pytest.approx(COMPILE_SHARE * 10.0 / 2.0)
    assert pace.width(0.5) == 1.0
    assert pace.timeout_s(10.0) == pytest.approx(COMPILE_SHARE * 10.0)
    assert pace.timeout_s(math.inf) is None
