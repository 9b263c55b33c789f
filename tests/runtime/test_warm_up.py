"""After a warm-up nothing is built or loaded any more, whatever the requests ask for and whoever runs them."""

import dataclasses
import weakref
from collections.abc import Callable

import jax
import pytest

from loongjax.core.cluster import Group
from loongjax.core.iteration import RecoverIteration
from loongjax.core.sampling import SamplingParams
from loongjax.runtime import program_calls
from loongjax.runtime.program_calls import ProgramKey
from loongjax.runtime.sampling import counts
from tests.checkpoints import make_checkpoint
from tests.runtime.driver import Driver, small_runtime

ASKED = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.7},
    "filtered": {"temperature": 1.0, "top_p": 0.5, "top_k": 7},
    "scored": {"temperature": 1.0, "logprobs": 5},
    "biased": {"temperature": 1.0, "logit_bias": dict.fromkeys(range(100), 1.0)},
    "penalised": {"temperature": 1.0, "presence_penalty": 1.0, "repetition_penalty": 1.2},
}


def test_nothing_is_built_or_loaded_after_a_warm_up(tmp_path, monkeypatch):
    for module in (counts, program_calls):  # so that these short prompts need the larger one
        monkeypatch.setattr(module, "HISTORY_CAPACITIES", (8, 64))
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "gqa", with_tokenizer=False)
    limits = {"max_num_seqs": 1, "max_num_batched_tokens": 64, "num_slots": 256}
    runtime = small_runtime(checkpoint, tmp_path / "cache", num_instances=2, warm_up=True, **limits)
    driver = Driver(runtime)
    assert runtime.num_recompiles == 0
    for name, asked in ASKED.items():
        driver.add(name, range(2, 20), SamplingParams(max_tokens=None, prompt_logprobs=1, **asked))
        driver.prefill((0, 1), {name: [(0, 0, 16), (1, 16, -1)]}, lands=name == "penalised")
        driver.decode((0, 1), {1: [name]}, lands=False)
        for _ in range(1 if name == "penalised" else 2):
            driver.land()
        driver.decode((0, 1), {1: [name]}, steps=2)
        driver.migrate(name, 0, 1, 16)
        driver.decode((1,), {1: [name]}, steps=2)
    driver.decode((0, 1), {0: ["greedy"], 1: ["penalised"]}, steps=2)
    runtime.submit(RecoverIteration(1000, Group((0, 1))))
    assert [completion.error for completion in runtime.completions(60.0)] == [None]
    assert runtime.num_recompiles == 0
    runtime.close()


@dataclasses.dataclass(frozen=True)
class Run:
    """Of a program in a warm-up."""

    group: Group
    program: Callable
    shapes: list[tuple[int, ...]]
    num_kept: int
    """Results of the run before that are still there."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Run]:
    """Of a whole warm-up of two instances."""
    runs: list[Run] = []
    results: list[weakref.ref] = []
    run = program_calls.ProgramCalls.run

    def noting(calls, call):
        shapes = [leaf.shape for leaf in jax.tree.leaves(call.arguments) if isinstance(leaf, jax.Array)]
        runs.append(Run(call.group, call.program, shapes, sum(result() is not None for result in results)))
        result = run(calls, call)
        results[:] = [weakref.ref(leaf) for leaf in jax.tree.leaves(result)]
        return result

    folder = tmp_path_factory.mktemp("warm-up")
    checkpoint = make_checkpoint(folder / "checkpoint", "gqa", with_tokenizer=False)
    limits = {"max_num_seqs": 1, "max_num_batched_tokens": 64, "num_slots": 256}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program_calls.ProgramCalls, "run", noting)
        small_runtime(checkpoint, folder / "cache", num_instances=2, warm_up=True, **limits).close()
    return runs


def test_all_programs_of_all_groups_are_run_before_any_is_run_again(runs):
    """The second time is slow, too, and what is loaded later makes it slow again."""
    ran = [(run.group, run.program, run.shapes) for run in runs]
    first, second = ran[: len(ran) // 2], ran[len(ran) // 2 :]
    assert first == second
    assert {group for group, *_ in first} == {Group((0,)), Group((1,)), Group((0, 1))}


def test_no_result_is_kept_while_another_program_runs(runs):
    """Those of the longest prefills take gigabytes on real sizes, and the pool leaves no room for several of them."""
    assert [run.num_kept for run in runs] == [0] * len(runs)


def test_no_chunk_of_any_size_builds_or_loads_anything_after_a_warm_up(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "gqa", with_tokenizer=False)
    limits = {"max_num_seqs": 2, "max_num_batched_tokens": 128, "num_slots": 512}
    chunks = {"policy": "chunked", "chunk_tokens": 100, "warm_up": True}
    runtime = small_runtime(checkpoint, tmp_path / "cache", num_instances=1, **limits, **chunks)
    driver = Driver(runtime)
    for name, asked in (("greedy", ASKED["greedy"]), ("penalised", ASKED["penalised"])):
        driver.add(name, range(2, 150), SamplingParams(max_tokens=None, **asked))
    for chunk_tokens in (100, 1):
        driver.extend(0, {"greedy": chunk_tokens})
    driver.extend(0, {"greedy": 2, "penalised": 98})
    driver.extend(0, {"greedy": -1, "penalised": -1})
    driver.extend(0, {"greedy": 1, "penalised": 1})
    driver.decode((0,), {0: ["greedy", "penalised"]}, lands=False)
    driver.extend(0, {"greedy": 1}, lands=False)
    driver.land()
    driver.decode((0,), {0: ["greedy"]}, lands=False)
    driver.land()
    driver.land()
    assert runtime.num_recompiles == 0
    runtime.close()


def test_without_a_warm_up_every_executable_is_counted(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "gqa", with_tokenizer=False)
    # Sizes of its own: the process remembers what other tests have compiled.
    limits = {"max_num_seqs": 3, "max_num_batched_tokens": 37, "num_slots": 208}
    runtime = small_runtime(checkpoint, tmp_path / "cache", num_instances=1, **limits)
    driver = Driver(runtime)
    driver.add("r", range(2, 9), SamplingParams(temperature=0.0, max_tokens=None))
    driver.prefill((0,), {"r": [(0, 0, -1)]})
    after_prefill = runtime.num_recompiles
    assert after_prefill >= 1
    driver.decode((0,), {0: ["r"]}, steps=1)
    after_decode = runtime.num_recompiles
    assert after_decode > after_prefill
    driver.decode((0,), {0: ["r"]}, steps=5)
    assert runtime.num_recompiles == after_decode
    runtime.close()


def test_masters_sub_batches_retention_and_slots_are_data(tmp_path):
    """What one set of instances has compiled for one plan serves every other plan of the same sizes."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "gqa", with_tokenizer=False)
    limits = {"max_num_seqs": 4, "max_num_batched_tokens": 41, "num_slots": 224}  # of its own, as above
    runtime = small_runtime(checkpoint, tmp_path / "cache", num_instances=3, **limits)
    driver = Driver(runtime)
    for name in "abcdef":
        driver.add(name, range(2, 36), SamplingParams(temperature=0.0, max_tokens=None))
    everyone = (0, 1, 2)
    driver.prefill(everyone, {"a": [(0, 0, 16), (2, 16, -1)], "b": [(1, 0, -1)]})
    driver.decode(everyone, {0: ["a", "b"]}, steps=2)
    before = runtime.num_recompiles
    assert before >= 2
    driver.prefill(everyone, {"c": [(2, 0, -1)], "d": [(2, 0, 16), (1, 16, 32), (0, 32, -1)]})
    driver.prefill(everyone, {"e": [(1, 0, 32), (0, 32, -1)], "f": [(0, 0, -1)]})
    driver.decode(everyone, {2: ["a", "d"]}, steps=2)
    driver.decode(everyone, {1: ["c", "a"], 0: ["f", "b"]}, steps=2)
    driver.decode(everyone, {0: ["a", "c"], 1: ["b", "d"], 2: ["e", "f"]}, steps=2)
    assert runtime.num_recompiles == before
    runtime.close()


def test_what_was_compiled_ahead_is_neither_built_nor_loaded_again(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "gqa", with_tokenizer=False)
    limits = {"max_num_seqs": 5, "max_num_batched_tokens": 43, "num_slots": 240}  # of its own, as above
    runtime = small_runtime(checkpoint, tmp_path / "cache", num_instances=2, **limits)
    driver = Driver(runtime)
    keys = [
        ProgramKey("prefill", 2, 43),
        ProgramKey("head", 2, 1),
        ProgramKey("sample", 2, 1),
        ProgramKey("decode", 2, 1),
        ProgramKey("migrate", 2),
    ]
    assert runtime.compile(keys) == set(keys)
    before = runtime.num_recompiles
    driver.add("r", range(2, 36), SamplingParams(temperature=0.0, max_tokens=None))
    driver.prefill((0, 1), {"r": [(0, 0, -1)]})
    driver.decode((0, 1), {0: ["r"]}, steps=3)
    driver.migrate("r", 0, 1, 16)
    assert runtime.num_recompiles == before
    runtime.close()


def test_nothing_is_compiled_when_the_time_is_over(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "gqa", with_tokenizer=False)
    runtime = small_runtime(checkpoint, tmp_path / "cache", num_instances=1, max_num_seqs=6)
    keys = [ProgramKey("decode", 1, rows) for rows in (1, 4, 6)]
    assert runtime.compile(keys, timeout_s=0.0) == set()
    runtime.close()
