"""Who gets peer memory, what programs get of it, and that a failed exchange costs no more than any other failure.

Where there are peers but not the kernels' packages, the ops leave everything to XLA's collectives: so CPUs too can run
all of the runtime's part in exchanges.
"""

import logging
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import loongjax.runtime.build as build
import loongjax.runtime.exchange as exchange
import loongjax.runtime.group_sampler as group_sampler
import loongjax.runtime.local as local
from loongjax.config import EngineConfig
from loongjax.core.cluster import Group
from loongjax.core.request import FinishReason, Request
from loongjax.core.sampling import SamplingParams
from loongjax.engine.client import ModelInfo
from loongjax.engine.core import EngineCore
from loongjax.pallas_kernels.exchange import PeerMemory, api, peers
from loongjax.parallel.mesh import DeviceGrid
from loongjax.runtime.exchange import GroupExchange, make_exchange
from loongjax.runtime.local import LocalRuntime
from loongjax.scheduler.simple import SimplePolicy
from tests.checkpoints import make_checkpoint
from tests.runtime.driver import GREEDY, Driver, Golden, small_runtime

FAILED = (1 + 1) | 0 << 8 | 5 << 16
"""The status of device 0 once it has waited in vain for message 5 of device 1."""
DESCRIPTION = "cpu:0 gave up waiting for cpu:1 (message 5 between them): all results since are void"
NUM_TOKENS = 12


class GpuGrid(DeviceGrid):
    """Says that its devices are GPUs."""

    @property
    def platform(self) -> str:
        return "gpu"


@pytest.fixture
def triton(monkeypatch) -> None:
    """As far as packages and GPUs go, Triton's kernels could run."""
    monkeypatch.setattr(exchange, "is_triton_usable", lambda: True)


@pytest.fixture
def reachable(monkeypatch) -> None:
    """Devices that could all reach each other's memory."""
    monkeypatch.setattr(peers, "check_reachable", lambda devices: None)


@pytest.mark.usefixtures("triton", "reachable")
def test_a_groups_peers_are_the_table_of_its_mesh_and_always_the_same_array():
    grid = GpuGrid(jax.devices()[:4], tp=2)
    found = make_exchange(EngineConfig(tp=2), grid)
    for group, places in [(Group((0, 1)), [[0, 1], [2, 3]]), (Group((1,)), [[2, 3]])]:
        table = found.peers(group)
        assert table is not None
        assert table.sharding == jax.sharding.NamedSharding(grid.mesh(group), jax.sharding.PartitionSpec())
        assert np.asarray(table)[..., 0].tolist() == places
        assert found.peers(group) is table


@pytest.mark.usefixtures("triton", "reachable")
def test_a_group_of_one_device_has_no_peers():
    found = make_exchange(EngineConfig(), GpuGrid(jax.devices()[:2]))
    assert found.peers(Group((1,))) is None
    assert found.peers(Group((0, 1))) is not None


@pytest.mark.usefixtures("triton")
def test_gpus_that_cannot_reach_each_other_use_xlas_collectives_and_say_so_once(caplog):
    found = make_exchange(EngineConfig(), GpuGrid(jax.devices()[:2]))
    assert found.peers(Group((0, 1))) is None
    assert caplog.text.count("the GPUs exchange by XLA's collectives, which is slower: peer memory needs GPUs") == 1


@pytest.mark.usefixtures("triton", "reachable")
def test_xlas_collectives_can_be_asked_for():
    found = make_exchange(EngineConfig(exchange="xla"), GpuGrid(jax.devices()[:2]))
    assert found.peers(Group((0, 1))) is None


@pytest.mark.usefixtures("reachable")
def test_where_tritons_kernels_cannot_run_nobody_has_peers(monkeypatch):
    monkeypatch.setattr(exchange, "is_triton_usable", lambda: False)
    found = make_exchange(EngineConfig(), GpuGrid(jax.devices()[:2]))
    assert found.peers(Group((0, 1))) is None


@pytest.mark.usefixtures("triton", "reachable")
def test_cpus_have_no_peers_and_nothing_is_said(caplog):
    caplog.set_level(logging.INFO)
    found = make_exchange(EngineConfig(), DeviceGrid(jax.devices()[:2]))
    assert found.peers(Group((0, 1))) is None
    assert caplog.text == ""


@pytest.mark.usefixtures("reachable")
def test_a_status_of_any_device_fails_the_iteration_with_its_description():
    grid = DeviceGrid(jax.devices()[:2])
    found = GroupExchange(grid, PeerMemory(jax.devices()[:2]))
    found.watch(None)()
    found.watch(jnp.zeros(2, jnp.int32))()
    check = found.watch(jnp.array([0, FAILED], jnp.int32))
    with pytest.raises(jax.errors.JaxRuntimeError) as raised:
        check()
    assert str(raised.value) == DESCRIPTION


@pytest.fixture(scope="module")
def runtime(tmp_path_factory) -> Iterator[LocalRuntime]:
    """Two instances of two devices, with peer memory: every group has peers."""
    folder = tmp_path_factory.mktemp("exchange")
    checkpoint = make_checkpoint(folder / "checkpoint", "gqa", with_tokenizer=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers, "check_reachable", lambda devices: None)
        patch.setattr(api, "is_triton_installed", lambda: False)
        patch.setattr(build, "make_exchange", lambda _, grid: GroupExchange(grid, PeerMemory(jax.devices()[:4])))
        limits = {"num_instances": 2, "tp": 2, "max_num_seqs": 1, "max_num_batched_tokens": 128, "num_slots": 96}
        runtime = small_runtime(checkpoint, folder / "cache", **limits)
        yield runtime
        runtime.close()


@pytest.fixture
def core(runtime) -> EngineCore:
    info = ModelInfo(
        checkpoint="gqa",
        max_model_len=runtime.limits.max_model_len,
        vocab_size=runtime.limits.vocab_size,
        eos_token_ids=(),
        default_sampling={},
    )
    return EngineCore(runtime, SimplePolicy(), info=info, checks=True)


def request(i: int, sampling: SamplingParams = GREEDY, max_tokens: int = NUM_TOKENS) -> Request:
    prompt = tuple(Golden("gqa").prompt(i))
    return Request(request_id=f"r{i}", prompt_token_ids=prompt, sampling=sampling, max_tokens=max_tokens, seed=0)


def generate(core: EngineCore, *requests: Request) -> dict[str, list[int]]:
    core.add(*requests)
    tokens: dict[str, list[int]] = {item.request_id: [] for item in requests}
    while not core.is_idle:
        for event in core.step(30.0):
            assert event.error is None, event.error
            assert event.finish_reason in (None, FinishReason.LENGTH)
            tokens[event.request_id] += event.token_ids
    assert core.death is None
    return tokens


def test_with_peers_tokens_are_those_of_transformers_and_nothing_is_built_twice(runtime):
    golden, num_recompiles = Golden("gqa"), []
    for _ in range(3):
        driver = Driver(runtime)
        driver.add("r", golden.prompt(2))
        driver.prefill((0, 1), {"r": [(0, 0, 16), (1, 16, -1)]})
        driver.decode((0, 1), {1: ["r"]}, steps=6)
        driver.decode((0, 1), {0: ["r"]}, steps=6)
        golden.check(driver, "r", 2)
        num_recompiles.append(runtime.num_recompiles)
    assert num_recompiles[1:] == num_recompiles[:1] * 2


class Failing:
    """Stands before a program whose last result are statuses, and has one call, or each if None, find a failure."""

    def __init__(self, program, at_call: int | None) -> None:
        self._program = program
        self._left = at_call
        self.has_failed = False

    def __call__(self, *arguments):
        *results, statuses = result = self._program(*arguments)
        if self._left is not None:
            self._left -= 1
            if self._left != 0:
                return result
        self.has_failed = True
        failed = jax.device_put(np.full(statuses.shape, FAILED, np.int32), statuses.sharding)
        return type(result)(*results, failed) if hasattr(result, "_fields") else (*results, failed)


@pytest.fixture
def resets(runtime, monkeypatch) -> list[tuple[jax.Device, ...]]:
    """The devices of every reset of the peer memory."""
    memory, found = runtime._exchange._memory, []
    original = memory.reset

    def reset(devices):
        found.append(devices)
        original(devices)

    monkeypatch.setattr(memory, "reset", reset)
    return found


@pytest.mark.parametrize("at_call", [1, 2, 5], ids=["prefill", "first decode", "later decode"])
def test_an_iteration_whose_exchanges_failed_is_recovered_from(core, monkeypatch, resets, caplog, at_call):
    expected = generate(core, request(2))
    failing = Failing(group_sampler.sample_step, at_call)
    monkeypatch.setattr(group_sampler, "sample_step", failing)
    assert generate(core, request(2)) == expected
    assert failing.has_failed
    assert DESCRIPTION in caplog.text
    assert resets == [tuple(jax.devices()[:2])]


def test_a_prefill_that_samples_nothing_reports_its_own_exchanges(core, monkeypatch, resets):
    failing = Failing(local.prefill_step, 1)
    monkeypatch.setattr(local, "prefill_step", failing)
    scoring = SamplingParams(temperature=0.0, max_tokens=0, prompt_logprobs=0)
    generate(core, request(2, scoring, max_tokens=0))
    assert failing.has_failed
    assert resets == [tuple(jax.devices()[:2])]


def test_exchanges_that_fail_without_a_request_too_end_the_engine(core, runtime, monkeypatch):
    monkeypatch.setattr(group_sampler, "sample_step", Failing(group_sampler.sample_step, 1))
    # Where tokens are sampled, the sampler's statuses tell; so of these only the recovery's are read.
    monkeypatch.setattr(local, "prefill_step", Failing(local.prefill_step, None))
    core.add(request(2))
    while core.death is None and not core.is_idle:
        core.step(30.0)
    assert core.death is not None
    assert f"fail even without a request: {DESCRIPTION}" in core.death
    monkeypatch.undo()
    while runtime.completions(1.0):
        pass
    runtime.submit(local.RecoverIteration(0, Group((0, 1))))
    (recovered,) = runtime.completions(30.0)
    assert recovered.error is None
