"""What is built before the clock of a replay starts, against what the rehearsal then runs."""

import dataclasses
import itertools

import pytest

from loongjax.core.cluster import ClusterShape
from loongjax.core.iteration import (
    DecodeIteration,
    ExtendIteration,
    Iteration,
    MigrateIteration,
    PrefillIteration,
)
from loongjax.parallel.striped import local_length
from loongjax.runtime.buckets import Buckets, fit
from loongjax.runtime.program_calls import ProgramKey
from loongjax.runtime.protocol import RuntimeLimits
from loongjax_profiling.replay.rehearsal import rehearse
from tests.profiling.iteration.scripted_runtime import ScriptedRuntime

SHAPE = ClusterShape(num_instances=2, num_pages=64, page_size=16)
LIMITS = RuntimeLimits(max_model_len=1000, max_num_batched_tokens=512, max_num_seqs=64, vocab_size=100)


def program_of(iteration, buckets: Buckets) -> ProgramKey:
    """The one with all layers of the model that a runtime needs for it."""
    dop = iteration.group.dop
    match iteration:
        case PrefillIteration():
            num_tokens = sum(len(item.token_ids) for item in iteration.inputs)
            return ProgramKey("prefill", dop, fit(local_length(num_tokens, dop), buckets.num_tokens))
        case DecodeIteration():
            [batch] = iteration.sub_batches
            return ProgramKey("decode", dop, fit(len(batch.inputs), buckets.num_rows))
        case ExtendIteration():
            num_tokens = sum(len(item.token_ids) for item in iteration.inputs)
            num_rows = fit(len(iteration.inputs), buckets.num_rows)
            return ProgramKey("extend", dop, fit(num_tokens, buckets.num_tokens), num_rows)
        case MigrateIteration():
            return ProgramKey("migrate", 2)
    raise AssertionError(iteration)


def inputs_of(iteration) -> tuple:
    return iteration.sub_batches[0].inputs if isinstance(iteration, DecodeIteration) else iteration.inputs


def await_of(before: Iteration, iteration: DecodeIteration | ExtendIteration, buckets: Buckets) -> ProgramKey:
    """The one that takes input tokens from those which the iteration before samples."""
    assert before.group == iteration.group
    num_sampled = len(inputs_of(before))
    if isinstance(before, PrefillIteration):
        num_sampled = local_length(num_sampled, before.group.dop)
    if isinstance(iteration, ExtendIteration):
        size = fit(sum(len(item.token_ids) for item in iteration.inputs), buckets.num_tokens)
    else:
        size = fit(len(inputs_of(iteration)), buckets.num_rows)
    return ProgramKey("await", iteration.group.dop, size, fit(num_sampled, buckets.num_rows))


@pytest.mark.parametrize("max_extend_tokens", [None, 100, 512])
def test_all_programs_are_compiled_side_by_side_before_any_is_run(max_extend_tokens, capsys):
    runtime = ScriptedRuntime(shape=SHAPE, limits=LIMITS)
    assert rehearse(runtime, max_extend_tokens=max_extend_tokens) == len(runtime.submitted)
    [compiled] = runtime.compiled
    told = f"rehearsing {len(runtime.submitted)} iterations of {len(compiled)} sizes on 3 groups"
    assert capsys.readouterr().out.startswith(told)
    assert len(set(compiled)) == len(compiled)
    buckets = Buckets.of(runtime.shape, runtime.limits)
    run = {program_of(iteration, buckets) for iteration in runtime.submitted} | {
        await_of(before, iteration, buckets)
        for before, iteration in itertools.pairwise(runtime.submitted)
        if isinstance(iteration, DecodeIteration | ExtendIteration) and inputs_of(iteration)[0].is_awaited
    }
    assert {key for key in compiled if key.name not in ("head", "sample")} == run


def test_all_iterations_of_all_groups_are_run_before_any_is_run_again():
    """The second time is slow, too, and what is loaded later makes it slow again."""
    runtime = ScriptedRuntime(shape=SHAPE, limits=LIMITS)
    rehearse(runtime, max_extend_tokens=100)
    ran = [(each.group, repr(dataclasses.replace(each, iteration_id=0))) for each in runtime.submitted]
    first, second = ran[: len(ran) // 2], ran[len(ran) // 2 :]
    assert first == second
    assert {group.instances for group, _ in first} == {(0,), (1,), (0, 1)}


def test_extends_of_every_size_up_to_the_largest_one():
    runtime = ScriptedRuntime(shape=SHAPE, limits=LIMITS)
    rehearse(runtime, max_extend_tokens=100)
    [compiled] = runtime.compiled
    extends = [key for key in compiled if key.name == "extend"]
    sizes = [size for size in Buckets.of(runtime.shape, runtime.limits).num_tokens if size <= 128]
    assert sizes[-1] == 128
    assert {key.size for key in extends} == set(sizes)
    assert {key.num_requests for key in extends if key.size == 128} == {1, 4, 16, 64}
    assert {key.dop for key in extends} == {1}
