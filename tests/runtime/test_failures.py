"""A program that fails costs its group the keys there, and nothing else: the same tokens come all the same."""

import dataclasses
import gc
import threading
import weakref
from collections.abc import Iterator

import jax
import pytest

import loongjax.runtime.local as local
from loongjax.core.iteration import Completion, RecoverIteration
from loongjax.core.request import FinishReason, Request, RequestEvent
from loongjax.engine import failures
from loongjax.engine.client import ModelInfo
from loongjax.engine.core import EngineCore
from loongjax.parallel.mesh import DeviceGrid
from loongjax.runtime.local import LocalRuntime
from loongjax.scheduler.baselines.chunked import ChunkedPolicy
from loongjax.scheduler.policy import Policy
from loongjax.scheduler.simple import SimplePolicy
from tests.checkpoints import make_checkpoint
from tests.runtime.driver import GREEDY, Golden, small_runtime

NUM_TOKENS = 12


@pytest.fixture(scope="module")
def shared_runtime(tmp_path_factory) -> Iterator[LocalRuntime]:
    folder = tmp_path_factory.mktemp("failures")
    checkpoint = make_checkpoint(folder / "checkpoint", "gqa", with_tokenizer=False)
    runtime = small_runtime(checkpoint, folder / "cache", num_instances=2, max_num_seqs=1, num_slots=64)
    yield runtime
    runtime.close()


@pytest.fixture
def core(shared_runtime) -> EngineCore:
    return make_core(shared_runtime)


def make_core(runtime: LocalRuntime, policy: Policy | None = None) -> EngineCore:
    info = ModelInfo(
        checkpoint="gqa",
        max_model_len=runtime.limits.max_model_len,
        max_whole_prompt_len=None if policy is None else runtime.limits.max_num_batched_tokens,
        vocab_size=runtime.limits.vocab_size,
        eos_token_ids=(),
        default_sampling={},
    )
    return EngineCore(runtime, policy or SimplePolicy(), info=info, checks=True)


class FailsOnce:
    """Stands before a program, and fails on one of its calls as a device would."""

    def __init__(self, program, at_call: int, *, takes_the_pool: bool) -> None:
        self._program = program
        self._left = at_call
        self._takes_the_pool = takes_the_pool
        self.has_failed = False

    def __call__(self, spec, weights, kv_pool, *arguments):
        self._left -= 1
        if self._left == 0:
            self.has_failed = True
            if self._takes_the_pool:
                kv_pool.delete()
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: injected")
        return self._program(spec, weights, kv_pool, *arguments)


def add_golden(core: EngineCore, prompts: list[int]) -> list[str]:
    golden = Golden("gqa")
    names = [f"r{i}" for i in prompts]
    for name, i in zip(names, prompts, strict=True):
        core.add(
            Request(
                request_id=name,
                prompt_token_ids=tuple(golden.prompt(i)),
                sampling=GREEDY,
                max_tokens=NUM_TOKENS,
                seed=0,
            )
        )
    return names


def generate(core: EngineCore, prompts: list[int]) -> list[list[int]]:
    names = add_golden(core, prompts)
    tokens: dict[str, list[int]] = {name: [] for name in names}
    while not core.is_idle:
        for event in core.step(30.0):
            assert event.error is None, event.error
            assert event.finish_reason in (None, FinishReason.LENGTH)
            tokens[event.request_id] += event.token_ids
    assert core.death is None
    assert sum(core.stats().kv_slots_used) == 0
    return [tokens[name] for name in names]


def run(core: EngineCore) -> list[RequestEvent]:
    """Until it is idle or dead."""
    events = []
    while core.death is None and not core.is_idle:
        events += core.step(30.0)
    return events


def recover(runtime: LocalRuntime) -> list[Completion]:
    """Takes what a dead engine left behind, and makes the runtime as good as new for the next test."""
    while runtime.completions(1.0):
        pass
    runtime.submit(RecoverIteration(0, local.Group((0, 1))))
    return runtime.completions(30.0)


@pytest.mark.parametrize("takes_the_pool", [False, True], ids=["pool kept", "pool taken"])
@pytest.mark.parametrize("at_call", [1, 2, 5])
def test_a_decode_that_fails_at_its_dispatch_is_recovered_from(core, monkeypatch, at_call, takes_the_pool):
    expected = generate(core, [1, 2])
    faulty = FailsOnce(local.decode_step, at_call, takes_the_pool=takes_the_pool)
    monkeypatch.setattr(local, "decode_step", faulty)
    assert generate(core, [1, 2]) == expected
    assert faulty.has_failed


@pytest.mark.parametrize("takes_the_pool", [False, True], ids=["pool kept", "pool taken"])
def test_a_prefill_that_fails_at_its_dispatch_is_recovered_from(core, monkeypatch, takes_the_pool):
    expected = generate(core, [1, 2])
    faulty = FailsOnce(local.prefill_step, 2, takes_the_pool=takes_the_pool)
    monkeypatch.setattr(local, "prefill_step", faulty)
    assert generate(core, [1, 2]) == expected
    assert faulty.has_failed


def test_a_failure_behind_the_dispatch_is_recovered_from(core, monkeypatch):
    expected = generate(core, [2])
    reads = []

    def read(pending):
        reads.append(pending)
        if len(reads) == 4:
            raise jax.errors.JaxRuntimeError("INTERNAL: injected")
        return original(pending)

    original = local.PendingTokens.read
    monkeypatch.setattr(local.PendingTokens, "read", read)
    assert generate(core, [2]) == expected
    assert len(reads) > 4


class FailsFor:
    """Stands before a function of an iteration, and fails as a bug would on those with a prompt of this length."""

    def __init__(self, function, prompt_len: int) -> None:
        self._function = function
        self._prompt_len = prompt_len

    def __call__(self, iteration, *arguments):
        if any(len(item.request.prompt_token_ids) == self._prompt_len for item in iteration.inputs):
            raise TypeError("a bug")
        return self._function(iteration, *arguments)


def test_requests_that_meet_a_bug_end_alone_and_as_many_as_there_are(core, monkeypatch):
    expected = generate(core, [1, 2])
    poison_len = len(Golden("gqa").prompt(1)) + 3
    monkeypatch.setattr(local, "pack_prefill", FailsFor(local.pack_prefill, poison_len))
    for i in range(4):
        core.add(
            Request(
                request_id=f"poison{i}",
                prompt_token_ids=(1,) * poison_len,
                sampling=GREEDY,
                max_tokens=2,
                seed=0,
            )
        )
    errors = [event.error for event in run(core)]
    assert errors == ["2 iterations in a row with it failed: TypeError: a bug"] * 4
    assert generate(core, [1, 2]) == expected


def test_a_long_prompt_that_meets_a_bug_amid_its_chunks_ends_alone(tmp_path, cache_dir, monkeypatch):
    """Those that shared an iteration with it are served, prompts longer than a prefill among them."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "gqa", with_tokenizer=False)
    runtime = small_runtime(
        checkpoint, cache_dir, num_instances=1, num_slots=512, max_num_batched_tokens=64, policy="chunked"
    )
    core = make_core(runtime, ChunkedPolicy(runtime.shape, 64))
    prompts = {f"r{i}": tuple(Golden("gqa").prompt(i)) for i in (1, 3, 4)} | {"poison": (1,) * 200}

    def serve(*names: str) -> dict[str, list[RequestEvent]]:
        sampling = dataclasses.replace(GREEDY, prompt_logprobs=None)
        for name in names:
            core.add(
                Request(
                    request_id=name,
                    prompt_token_ids=prompts[name],
                    sampling=sampling,
                    max_tokens=NUM_TOKENS,
                    seed=0,
                )
            )
        events = run(core)
        return {name: [event for event in events if event.request_id == name] for name in names}

    def tokens(events: list[RequestEvent]) -> list[int]:
        assert [event.error for event in events] == [None] * NUM_TOKENS
        return [token_id for event in events for token_id in event.token_ids]

    def pack(iteration, *arguments):
        names = [item.request.request_id for item in iteration.inputs]
        if any(item.request.request_id == "poison" and item.position > 100 for item in iteration.inputs):
            failed.append(names)
            raise TypeError("a bug")
        return pack_extend(iteration, *arguments)

    expected = serve("r1", "r3", "r4")
    failed, pack_extend = [], local.pack_extend
    monkeypatch.setattr(local, "pack_extend", pack)
    served = serve("r1", "poison", "r3", "r4")
    for name in expected:
        assert tokens(served[name]) == tokens(expected[name])
    (last,) = served["poison"]
    assert last.error == "2 iterations in a row with it failed: TypeError: a bug"
    assert failed == [["r1", "poison"], ["poison"]]
    runtime.close()


def test_devices_that_fail_without_a_request_too_end_the_engine(shared_runtime, core, monkeypatch):
    def broken(*arguments):
        raise jax.errors.JaxRuntimeError("INTERNAL: injected")

    monkeypatch.setattr(local, "prefill_step", broken)
    add_golden(core, [1])
    (event,) = run(core)
    assert core.death is not None
    assert "fail even without a request: INTERNAL: injected" in core.death
    assert event.finish_reason is FinishReason.ERROR
    monkeypatch.undo()
    assert recover(shared_runtime)[0].error is None


def test_a_device_that_fails_by_itself_is_named(shared_runtime, monkeypatch):
    def broken(device):
        if device == jax.devices()[1]:
            raise jax.errors.JaxRuntimeError("INTERNAL: injected")

    monkeypatch.setattr(local, "touch", broken)
    (failed,) = recover(shared_runtime)
    assert failed.error == f"{jax.devices()[1]} of instance 1 fails: INTERNAL: injected"
    monkeypatch.undo()
    (recovered,) = recover(shared_runtime)
    assert recovered.error is None


def test_an_engine_whose_devices_answer_nothing_can_be_closed(tmp_path, cache_dir, monkeypatch):
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "gqa", with_tokenizer=False)
    core = make_core(small_runtime(checkpoint, cache_dir, num_instances=1, max_num_seqs=1, num_slots=64))
    answers = threading.Event()
    monkeypatch.setattr(failures, "RECOVERY_TIMEOUT_S", 0.2)
    monkeypatch.setattr(local, "pack_prefill", FailsFor(local.pack_prefill, len(Golden("gqa").prompt(1))))
    monkeypatch.setattr(LocalRuntime, "_check_devices", lambda runtime, group: answers.wait(60.0))
    add_golden(core, [1])
    while core.death is None:
        core.step(0.1)
    assert "did not answer" in core.death
    closing = threading.Thread(target=core.close)
    closing.start()
    closing.join(10.0)
    has_closed = not closing.is_alive()
    answers.set()
    closing.join()
    assert has_closed


def test_renewing_never_holds_two_pools(shared_runtime, monkeypatch):
    pool = shared_runtime._kv_pool
    group = local.Group((0, 1))
    old, alive = [weakref.ref(pool.view(group))], []

    def shards_of(*arguments):
        shards = original_shards_of(*arguments)
        old.extend(map(weakref.ref, shards))
        return shards

    def new_shards(instance):
        alive.append(sum(reference() is not None for reference in old))
        return original_new_shards(instance)

    original_shards_of, original_new_shards = pool._grid.shards_of, pool._new_shards
    monkeypatch.setattr(DeviceGrid, "shards_of", staticmethod(shards_of))
    monkeypatch.setattr(pool, "_new_shards", new_shards)
    pool.renew(group)
    assert len(old) > 2
    assert alive == [0, 0]


@pytest.fixture
def no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("at_call", [1, 3], ids=["prefill", "decode"])
@pytest.mark.usefixtures("no_garbage_collection")
def test_a_failed_dispatch_keeps_no_pool_from_being_renewed(shared_runtime, core, monkeypatch, at_call):
    expected = generate(core, [1])
    pool = shared_runtime._kv_pool
    calls, old, alive = [], [], []

    def sample(sampler, *arguments):
        calls.append(sampler)
        if len(calls) == at_call:
            old.extend((group, weakref.ref(view)) for group, view in pool._views.items())
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: injected")
        return original_sample(sampler, *arguments)

    def new_shards(instance):
        alive.append([view() is not None for group, view in old if instance in group])
        return original_new_shards(instance)

    original_sample, original_new_shards = local.GroupSampler.sample, pool._new_shards
    monkeypatch.setattr(local.GroupSampler, "sample", sample)
    monkeypatch.setattr(pool, "_new_shards", new_shards)
    assert generate(core, [1]) == expected
    assert alive == [[False]]
