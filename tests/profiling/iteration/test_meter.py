"""How a case is timed: against a runtime whose times are known."""

import itertools
import statistics
from typing import get_args

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from loongjax.core.cluster import ClusterShape, Group
from loongjax.core.iteration import (
    DecodeIteration,
    ExtendIteration,
    MigrateIteration,
    PrefillIteration,
    RecoverIteration,
)
from loongjax.costmodel.work import Strategy
from loongjax_profiling.iteration.case import Case, Kind
from loongjax_profiling.iteration.meter import (
    FIRST_STEPS,
    DevicesLostError,
    IterationFailedError,
    Meter,
    MeterConfig,
)
from loongjax_profiling.iteration.placement import why_not
from tests.profiling.iteration.scripted_runtime import LIMITS, SHAPE, ScriptedRuntime

TWO = Strategy(2)
PREFILL = Case(kind="prefill", strategy=TWO, batch_size=3, input_len=100)
DECODE = Case(kind="decode", strategy=TWO, batch_size=5, input_len=40, num_masters=2)
EXTEND = Case(kind="extend", strategy=Strategy(1), batch_size=2, input_len=30, past_len=70, num_decodes=3)
MIGRATION = Case(kind="migration", strategy=TWO, input_len=50)


def slots_of(iteration: PrefillIteration) -> set[tuple[int, int]]:
    return {(kept.instance, slot) for item in iteration.inputs for kept in item.kept for slot in kept.slots.tolist()}


def test_a_prefills_time_is_the_median_of_its_rounds_without_the_first_two():
    """A GPU's graphs are made in the second."""
    times = [50.0, 20.0, 3.0, 1.0, 2.0, 9.0]
    runtime = ScriptedRuntime(lambda _, index: times[index])
    timing = Meter(runtime, MeterConfig(rounds=4, enough_s=100.0)).measure(PREFILL)
    assert timing.seconds == statistics.median([3.0, 1.0, 2.0, 9.0])
    assert timing.stddev_s == statistics.stdev([3.0, 1.0, 2.0, 9.0])
    assert timing.num_rounds == 4


@pytest.mark.parametrize("case", [PREFILL, EXTEND])
def test_what_is_timed_is_submitted_behind_another_one(case: Case):
    """The host takes a second before the devices have anything to do."""

    class SlowHost(ScriptedRuntime):
        num_in_flight = 0

        def submit(self, iteration):
            self._now_s += 1.0
            self.num_in_flight += 1
            super().submit(iteration)

        def completions(self, timeout_s):
            completions = super().completions(timeout_s)
            self.num_in_flight -= len(completions)
            return completions

    runtime = SlowHost(lambda *_: 5.0)
    assert Meter(runtime, MeterConfig(enough_s=100.0)).measure(case).seconds == pytest.approx(5.0)
    assert runtime.num_in_flight == 0
    assert len(runtime.submitted) == 2 + MeterConfig().rounds


def test_prefills_that_need_most_of_the_workspace_are_alone():
    most = LIMITS.max_num_batched_tokens

    def num_in_flight(tokens: int) -> int:
        alone = Case(kind="prefill", strategy=Strategy(2), batch_size=2, input_len=tokens)
        elapsed_s: list[float] = []

        class Noting(ScriptedRuntime):
            def completions(self, timeout_s):
                completions = super().completions(timeout_s)
                elapsed_s.extend(completion.elapsed_s for completion in completions)
                return completions

        shape = ClusterShape(num_instances=2, num_pages=4 * most, page_size=16)
        Meter(Noting(lambda *_: 0.5, shape=shape)).measure(alone)
        return round(max(elapsed_s) / 0.5)

    assert num_in_flight(most // 2) == 2
    assert num_in_flight(most // 2 + 1) == 1


def test_what_takes_long_is_not_repeated_more_often_than_once():
    runtime = ScriptedRuntime(lambda *_: 10.0)
    timing = Meter(runtime, MeterConfig(rounds=4, enough_s=3.0)).measure(PREFILL)
    assert timing.num_rounds == 1
    assert timing.stddev_s is None
    assert len(runtime.submitted) == 2


def test_a_prefill_is_the_requests_of_its_case_on_its_group():
    runtime = ScriptedRuntime()
    Meter(runtime).measure(PREFILL)
    for iteration in runtime.submitted:
        assert isinstance(iteration, PrefillIteration)
        assert iteration.group == Group((0, 1))
        assert [len(item.token_ids) for item in iteration.inputs] == [100, 100, 100]
        assert len({item.request.request_id for item in iteration.inputs}) == 3
        assert len(slots_of(iteration)) == 300
        tokens = np.concatenate([item.token_ids for item in iteration.inputs])
        assert tokens.min() >= 0
        assert tokens.max() < LIMITS.vocab_size


def test_prefills_go_round_the_pool():
    runtime = ScriptedRuntime()
    Meter(runtime, MeterConfig(rounds=3)).measure(PREFILL)
    rounds = [slots_of(iteration) for iteration in runtime.submitted if isinstance(iteration, PrefillIteration)]
    assert all(one.isdisjoint(other) for one, other in itertools.combinations(rounds, 2))


def test_decodes_read_keys_that_were_computed():
    runtime = ScriptedRuntime()
    meter = Meter(runtime, MeterConfig(rounds=3))
    meter.measure(PREFILL)
    meter.measure(DECODE)
    written = {
        (instance, slot // SHAPE.page_size)
        for iteration in runtime.submitted
        if isinstance(iteration, PrefillIteration)
        for instance, slot in slots_of(iteration)
    }
    first = next(iteration for iteration in runtime.submitted if isinstance(iteration, DecodeIteration))
    read = {
        (table.instance, page)
        for batch in first.sub_batches
        for item in batch.inputs
        for table in item.tables
        for page in table.page_indices.tolist()
    }
    assert read <= written


def test_scaling_down_keeps_everything_on_the_first_instance_if_it_fits():
    runtime = ScriptedRuntime()
    Meter(runtime).measure(Case(kind="prefill", strategy=TWO, batch_size=3, input_len=100, scales_down=True))
    for iteration in runtime.submitted:
        assert isinstance(iteration, PrefillIteration)
        assert {instance for instance, _ in slots_of(iteration)} == {0}


def test_a_decodes_time_is_that_between_results_without_the_first_steps():
    runtime = ScriptedRuntime(lambda _, index: 7.0 if index < FIRST_STEPS else 2.0)
    timing = Meter(runtime, MeterConfig(num_steps=5)).measure(DECODE)
    assert timing.seconds == 2.0
    assert timing.stddev_s == 0.0
    assert timing.num_rounds == 5


def test_a_decodes_steps_continue_each_other_one_token_at_a_time():
    runtime = ScriptedRuntime()
    Meter(runtime, MeterConfig(num_steps=4)).measure(DECODE)
    steps = [iteration for iteration in runtime.submitted if isinstance(iteration, DecodeIteration)]
    assert len(steps) == len(runtime.submitted) == FIRST_STEPS + 4
    assert [step.continues for step in steps] == [False] + [True] * (len(steps) - 1)
    for number, step in enumerate(steps):
        assert [len(batch.inputs) for batch in step.sub_batches] == [3, 2]
        for batch in step.sub_batches:
            for item in batch.inputs:
                assert item.position == 40 + number
                assert sum(table.num_tokens for table in item.tables) == item.position + 1
                newest = item.tables[-1]
                assert newest.instance == batch.master
                last_page = newest.page_indices[(newest.num_tokens - 1) // SHAPE.page_size]
                assert item.slot == last_page * SHAPE.page_size + (newest.num_tokens - 1) % SHAPE.page_size


def test_a_decodes_keys_are_those_of_its_middle_step():
    runtime = ScriptedRuntime()
    timing = Meter(runtime, MeterConfig(num_steps=5)).measure(DECODE)
    middle = (FIRST_STEPS + 5) // 2
    step = runtime.submitted[middle]
    assert isinstance(step, DecodeIteration)
    keys = [0, 0]
    for batch in step.sub_batches:
        for item in batch.inputs:
            for table in item.tables:
                keys[table.instance] += table.num_tokens
    assert timing.keys == tuple(keys)
    assert sum(keys) == 5 * (40 + middle + 1)


def test_an_extend_is_its_chunks_and_decodes_behind_keys_that_stay_what_they_were():
    runtime = ScriptedRuntime()
    meter = Meter(runtime, MeterConfig(rounds=3))
    assert meter.measure(EXTEND).seconds == 1.0
    assert len(runtime.submitted) == 5
    for iteration in runtime.submitted:
        assert isinstance(iteration, ExtendIteration)
        assert iteration.group == Group((0,))
        assert [len(item.token_ids) for item in iteration.inputs] == [30, 30, 1, 1, 1]
        pages = [page for item in iteration.inputs for page in item.table.page_indices.tolist()]
        assert len(set(pages)) == len(pages)
        for item in iteration.inputs:
            assert item.position == 70
            assert item.is_sampled
            assert (item.table.instance, item.table.num_tokens) == (0, 70 + len(item.token_ids))
            places = np.arange(70, item.table.num_tokens)
            expected = item.table.page_indices[places // SHAPE.page_size] * SHAPE.page_size + places % SHAPE.page_size
            np.testing.assert_array_equal(item.slots, expected)
    meter.check_integrity()


def test_a_migration_goes_there_and_back():
    runtime = ScriptedRuntime()
    timing = Meter(runtime, MeterConfig(rounds=3)).measure(MIGRATION)
    assert timing.seconds == 1.0
    ways = []
    for iteration in runtime.submitted:
        assert isinstance(iteration, MigrateIteration)
        assert len(iteration.source_slots) == len(iteration.target_slots) == 50
        ways.append((iteration.source, iteration.target))
    assert ways == [(0, 1), (1, 0), (0, 1), (1, 0)]


@pytest.mark.parametrize("case", [PREFILL, DECODE, EXTEND, MIGRATION], ids=str)
def test_after_a_failure_the_group_recovers_and_the_next_case_is_measured(case):
    failing = [True]
    runtime = ScriptedRuntime(
        error=lambda iteration: "no memory" if failing[0] and not isinstance(iteration, RecoverIteration) else None
    )
    meter = Meter(runtime)
    with pytest.raises(IterationFailedError, match="no memory"):
        meter.measure(case)
    recovery = runtime.submitted[-1]
    assert isinstance(recovery, RecoverIteration)
    assert recovery.group == Group.of(range(case.strategy.sp))
    failing[0] = False
    for other in (PREFILL, DECODE, EXTEND, MIGRATION):
        assert meter.measure(other).seconds == 1.0


def test_a_failure_without_recovery_ends_it():
    with pytest.raises(DevicesLostError, match="did not recover from a failed iteration: broken"):
        Meter(ScriptedRuntime(error=lambda _: "broken")).measure(PREFILL)


def test_an_iteration_that_does_not_come_back_ends_it():
    runtime = ScriptedRuntime(lambda *_: 1000.0)
    with pytest.raises(DevicesLostError, match="did not end within 600 s"):
        Meter(runtime).measure(PREFILL)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kind: Kind = draw(st.sampled_from(get_args(Kind)))
    sp = {"migration": 2, "extend": 1}.get(kind) or draw(st.integers(1, 4))
    batch_size = 1 if kind == "migration" else draw(st.integers(1, 20))
    is_extend = kind == "extend"
    return Case(
        kind=kind,
        strategy=Strategy(sp),
        batch_size=batch_size,
        input_len=draw(st.integers(2 if is_extend else 1, 700)),
        past_len=draw(st.integers(1, 700)) if is_extend else 0,
        num_decodes=draw(st.integers(0, 50)) if is_extend else 0,
        num_masters=draw(st.integers(1, min(sp, batch_size))) if kind == "decode" else 0,
        scales_down=kind == "prefill" and draw(st.booleans()),
    )


@settings(deadline=None)
@given(st.lists(cases(), max_size=6), st.sampled_from([1, 4, 16]), st.integers(1, 400))
def test_whatever_fits_can_be_measured_one_after_the_other(chosen, page_size, num_pages):
    shape = ClusterShape(num_instances=4, num_pages=num_pages, page_size=page_size)
    meter = Meter(ScriptedRuntime(shape=shape), MeterConfig(rounds=2, num_steps=4))
    for case in chosen:
        if why_not(case, shape=shape, limits=LIMITS, num_steps=FIRST_STEPS + 4) is None:
            assert meter.measure(case).seconds == 1.0
        meter.check_integrity()
