"""What is noted of iterations, against times worked out by hand."""

import dataclasses

import numpy as np
import pytest

from loongjax.core.cluster import Group
from loongjax.core.iteration import (
    DecodeInput,
    DecodeIteration,
    DecodeSubBatch,
    InstanceTable,
    MigrateIteration,
    PrefillInput,
    PrefillIteration,
    RecoverIteration,
)
from loongjax.costmodel.work import DecodeWork, PrefillWork
from loongjax.runtime.protocol import Runtime
from loongjax_profiling.replay.rehearsal import REQUEST
from loongjax_profiling.replay.traced_runtime import TracedRuntime
from tests.profiling.iteration.scripted_runtime import ScriptedRuntime
from tests.profiling.simulate.systems import RoundModel

TABLE = InstanceTable(0, np.zeros(1, np.int32), 7)


def prefill(iteration_id: int, *instances: int, num_tokens: int = 10) -> PrefillIteration:
    item = PrefillInput(REQUEST, np.zeros(num_tokens, np.int32), (), False)
    return PrefillIteration(iteration_id, Group.of(instances), (item,))


def decode(iteration_id: int, *, continues: bool = False) -> DecodeIteration:
    item = DecodeInput(REQUEST, (), 6, 0, (TABLE,))
    return DecodeIteration(iteration_id, Group((0,)), (DecodeSubBatch(0, (item,)),), continues)


def traced(*seconds: float) -> TracedRuntime:
    """Whose iterations take so long, in order of submission, one after the other."""
    return TracedRuntime(ScriptedRuntime(lambda iteration, index: seconds[index]))


def run(runtime: TracedRuntime, *iterations) -> None:
    """One after the other, each when the one before it has ended."""
    for iteration in iterations:
        runtime.submit(iteration)
        assert [completion.iteration_id for completion in runtime.completions(None)] == [iteration.iteration_id]


def test_it_is_a_runtime_with_the_other_ones_shape_limits_and_clock():
    inner = ScriptedRuntime()
    runtime = TracedRuntime(inner)
    assert isinstance(runtime, Runtime)
    assert (runtime.shape, runtime.limits, runtime.now_s()) == (inner.shape, inner.limits, inner.now_s())
    runtime.close()
    assert inner.is_closed


def test_an_iteration_on_idle_instances_begins_when_it_is_submitted():
    runtime = traced(2.0, 3.0)
    run(runtime, prefill(0, 0), prefill(1, 1, 2))
    first, second = runtime.take_iterations()
    assert (first.begin_s, first.end_s, first.elapsed_s) == (0.0, 2.0, 2.0)
    assert (second.begin_s, second.end_s, second.group) == (2.0, 5.0, Group((1, 2)))


def test_one_that_was_submitted_behind_another_begins_when_that_has_ended():
    runtime = traced(2.0, 3.0)
    runtime.submit(decode(0))
    runtime.submit(decode(1, continues=True))
    runtime.completions(None)
    runtime.completions(None)
    _, behind = runtime.take_iterations()
    assert (behind.submitted_s, behind.begin_s, behind.end_s) == (0.0, 2.0, 5.0)
    assert behind.turnaround_s is None


def test_a_turnaround_counts_from_the_news_that_the_engine_had():
    runtime = traced(2.0, 3.0, 1.0)
    runtime.submit(prefill(0, 0))
    assert len(runtime.completions(None)) == 1
    runtime.submit(decode(1))
    assert runtime.completions(0.0) == []  # nothing new: what follows is not an answer to the prefill's end
    runtime.submit(prefill(2, 3))
    runtime.completions(None)
    runtime.completions(None)
    assert [each.turnaround_s for each in runtime.take_iterations()] == [None, 0.0, None]


def test_what_each_had_to_do_is_noted_in_the_cost_models_terms():
    runtime = traced(1.0, 1.0, 1.0, 1.0, 1.0)
    moved = MigrateIteration(3, 0, 1, np.zeros(5, np.int32), np.zeros(5, np.int32))
    run(runtime, prefill(0, 0), decode(1), decode(2, continues=True), moved, RecoverIteration(4, Group((0,))))
    iterations = runtime.take_iterations()
    assert [each.kind for each in iterations] == ["prefill", "decode", "decode", "migrate", "recover"]
    assert [each.continues for each in iterations] == [False, False, True, False, False]
    assert [each.work for each in iterations] == [
        PrefillWork(new_lens=(10,)),
        DecodeWork(rows=(1,), keys=(7,)),
        DecodeWork(rows=(1,), keys=(7,)),
        5,
        None,
    ]
    assert [each.predicted_s(RoundModel(), 1) for each in iterations] == [0.01, 0.01, 0.01, 0.0, None]


def test_a_prefill_on_two_instances_is_predicted_as_one_on_two():
    runtime = traced(1.0)
    run(runtime, prefill(0, 1, 2, num_tokens=500))
    (iteration,) = runtime.take_iterations()
    assert iteration.predicted_s(RoundModel(), 1) == pytest.approx(0.25)


def test_a_failed_iteration_is_noted_as_failed():
    runtime = TracedRuntime(ScriptedRuntime(error=lambda iteration: "it broke"))
    run(runtime, prefill(0, 0))
    (iteration,) = runtime.take_iterations()
    assert iteration.error == "it broke"


def test_iterations_are_taken_once():
    runtime = traced(1.0)
    run(runtime, prefill(0, 0))
    assert len(runtime.take_iterations()) == 1
    assert runtime.take_iterations() == []


def test_an_iteration_is_a_value_that_json_can_hold_but_for_its_group():
    runtime = traced(1.0)
    run(runtime, decode(0))
    (iteration,) = runtime.take_iterations()
    assert dataclasses.asdict(iteration)["work"] == {"rows": (1,), "keys": (7,)}


def test_one_whose_result_is_read_before_that_of_the_one_before_it_takes_no_time():
    runtime = traced(3.0, -1.0)
    runtime.submit(decode(0))
    runtime.submit(decode(1, continues=True))
    runtime.completions(None)
    runtime.completions(None)
    _, overtaking = runtime.take_iterations()
    assert (overtaking.begin_s, overtaking.end_s, overtaking.elapsed_s) == (2.0, 2.0, 0.0)
