"""The engine on peer memory: the tokens of XLA's collectives, nothing built after the first time, and a late peer is
recovered from."""

import itertools
import logging
from collections.abc import Callable, Iterator

import jax
import pytest

from loongjax.core.cluster import Group
from loongjax.core.iteration import Completion, Iteration, RecoverIteration
from loongjax.pallas_kernels.exchange import PeerMemory
from loongjax.runtime.exchange import GroupExchange
from loongjax.runtime.local import LocalRuntime
from tests.checkpoints import make_checkpoint
from tests.gpu.busy import keep_busy
from tests.runtime.driver import Driver, Golden, poison_pool, small_runtime

pytestmark = [pytest.mark.gpu, pytest.mark.alone]


@pytest.fixture(scope="module")
def make_runtime(tmp_path_factory) -> Iterator[Callable[..., LocalRuntime]]:
    """A float32 runtime of 2 GPUs, or more."""
    folder = tmp_path_factory.mktemp("exchange")
    checkpoint = make_checkpoint(folder / "checkpoint", "gqa", with_tokenizer=False)
    made: list[LocalRuntime] = []

    def make(tp: int = 1, num_instances: int = 2, **settings) -> LocalRuntime:
        if tp * num_instances > len(jax.devices()):
            pytest.skip(f"needs {tp * num_instances} GPUs")
        cut = {"tp": tp, "num_instances": num_instances}
        made.append(small_runtime(checkpoint, folder / "cache", dtype="float32", **cut, **settings))
        return made[-1]

    yield make
    for runtime in made:
        runtime.close()


CUTS = [(1, 2), (2, 1), (2, 2), (1, 4), (4, 1)]


def histories(driver: Driver) -> dict[str, list[int]]:
    """Tokens of two requests of many masters, groups and steps."""
    golden, everyone = Golden("gqa"), driver.runtime.shape.all_instances
    first, last = everyone[0], everyone[-1]
    driver.add("long", golden.prompt(3))
    driver.add("mate", golden.prompt(1))
    driver.prefill(everyone, {"long": [(first, 0, 64), (last, 64, -1)] if last else [(0, 0, -1)]})
    driver.prefill((last,), {"mate": [(last, 0, -1)]})
    for step in range(6):
        masters = {first: ["long"], last: ["mate"]} if last else {0: ["long", "mate"]}
        driver.decode(everyone, masters, steps=2)
        driver.decode(everyone, {last: ["mate", "long"]} if step % 2 else {first: ["long", "mate"]})
    return driver.tokens


@pytest.mark.parametrize(("tp", "num_instances"), CUTS, ids=lambda value: f"{value}")
def test_tokens_are_those_of_xlas_collectives_and_of_transformers(make_runtime, caplog, tp, num_instances):
    caplog.set_level(logging.INFO)
    tokens = {}
    for exchange in ("auto", "xla"):
        runtime = make_runtime(tp, num_instances, exchange=exchange)
        has_peers = runtime._exchange.peers(Group(runtime.shape.all_instances)) is not None
        assert has_peers == (exchange == "auto")
        poison_pool(runtime)
        driver = Driver(runtime)
        tokens[exchange] = histories(driver)
        golden = Golden("gqa")
        golden.check(driver, "long", 3)
        golden.check(driver, "mate", 1)
    assert tokens["auto"] == tokens["xla"]
    assert "GPUs exchange small messages through each other's memory" in caplog.text


def test_groups_that_come_and_go_keep_their_tokens(make_runtime):
    """Pairs of four instances in changing order, each with one request: what pairs count must stay even."""
    runtime = make_runtime(1, 4)
    golden, driver = Golden("gqa"), Driver(runtime)
    names = [f"r{i}" for i in range(4)]
    for i, name in enumerate(names):
        driver.add(name, golden.prompt(2))
        driver.prefill((i,), {name: [(i, 0, -1)]})
    orders = list(itertools.chain.from_iterable(itertools.combinations(range(4), dop) for dop in (2, 3, 4)))
    for step in range(22):
        order = orders[step * 7 % len(orders)]
        driver.decode(order, {i: [names[i]] for i in order})
    for name in names:
        golden.check(driver, name, 2)


@pytest.mark.parametrize(("tp", "num_instances"), [(1, 2), (2, 1)], ids=["sp2", "tp2"])
def test_after_a_warm_up_nothing_is_built_or_loaded(make_runtime, tp, num_instances):
    limits = {"max_num_seqs": 2, "max_num_batched_tokens": 256, "num_slots": 512}
    runtime = make_runtime(tp, num_instances, warm_up=True, **limits)
    histories(Driver(runtime))
    assert runtime.num_recompiles == 0
    assert complete(runtime, RecoverIteration(0, Group(runtime.shape.all_instances))).error is None
    assert runtime.num_recompiles == 0


def complete(runtime: LocalRuntime, iteration: Iteration) -> Completion:
    runtime.submit(iteration)
    (completion,) = runtime.completions(60.0)
    return completion


@pytest.mark.parametrize(("tp", "num_instances"), [(1, 2), (2, 1)], ids=["sp2", "tp2"])
def test_an_iteration_with_a_peer_that_comes_too_late_fails_and_after_a_recovery_all_is_well(
    make_runtime, tp, num_instances
):
    runtime = make_runtime(tp, num_instances)
    everyone = runtime.shape.all_instances
    golden = Golden("gqa")

    def serve(steps: int) -> Driver:
        driver = Driver(runtime)
        driver.add("r", golden.prompt(2))
        driver.prefill(everyone, {"r": [(everyone[-1], 0, -1)]})
        driver.decode(everyone, {everyone[0]: ["r"]}, steps=steps)
        golden.check(driver, "r", 2)
        return driver

    serve(2)  # so that no program is loaded for the first time below
    patient = runtime._exchange
    runtime._exchange = GroupExchange(runtime._grid, PeerMemory(jax.devices()[:2], wait_limit_s=0.1))
    driver = serve(2)
    keep_busy(jax.devices()[1]).block_until_ready()
    blocked = keep_busy(jax.devices()[1])
    with pytest.raises(AssertionError, match=f"{jax.devices()[0]} gave up waiting for {jax.devices()[1]}"):
        driver.decode(everyone, {everyone[0]: ["r"]})
    blocked.block_until_ready()
    assert complete(runtime, RecoverIteration(0, Group(everyone))).error is None
    serve(12)
    runtime._exchange = patient
    serve(12)
