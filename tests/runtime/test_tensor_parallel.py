"""Instances of several devices, against transformers: elastic histories change nothing, however instances are cut.

On 8 devices tp leaves 8 / tp instances. Groups are the last ones, so that all tests of a runtime share executables.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator

import pytest

from loongjax.runtime.local import LocalRuntime
from tests.checkpoints import make_checkpoint
from tests.runtime.driver import Driver, Golden, poison_pool, small_runtime

VARIANTS = {2: "gqa", 4: "mha", 8: "mha"}
"""By tp, a golden checkpoint whose KV heads it divides: that leaves 2, 2 and 1 of them to a device."""

CUTS = [(tp, page_size) for tp in VARIANTS for page_size in (1, 16)]


def every_cut_and_dop() -> list[tuple[tuple[int, int], int]]:
    return [((tp, page_size), dop) for tp, page_size in CUTS for dop in range(1, 8 // tp + 1)]


def cut_id(value: tuple[int, int] | int) -> str:
    return f"dop{value}" if isinstance(value, int) else "tp{}-page{}".format(*value)


@pytest.fixture(scope="module")
def runtime_of(tmp_path_factory, cache_dir) -> Iterator[Callable[[int, int], LocalRuntime]]:
    """One runtime a cut; a parametrized fixture would make one for each DoP too."""
    with contextlib.ExitStack() as stack:

        @functools.cache
        def build(tp: int, page_size: int) -> LocalRuntime:
            checkpoint = make_checkpoint(tmp_path_factory.mktemp("checkpoint"), VARIANTS[tp], with_tokenizer=False)
            runtime = small_runtime(checkpoint, cache_dir, tp=tp, page_size=page_size)
            stack.callback(runtime.close)
            assert runtime.shape.num_instances == 8 // tp
            return runtime

        yield build


@pytest.fixture
def runtime(request, runtime_of) -> LocalRuntime:
    return runtime_of(*request.param)


@pytest.fixture
def golden(runtime) -> Golden:
    return Golden(VARIANTS[runtime.shape.tp])


@pytest.fixture
def driver(runtime) -> Driver:
    poison_pool(runtime)
    return Driver(runtime)


@pytest.mark.parametrize(("runtime", "dop"), every_cut_and_dop(), indirect=["runtime"], ids=cut_id)
def test_every_dop_gives_the_tokens_of_transformers(driver, golden, dop):
    *_, last = group = driver.runtime.shape.all_instances[-dop:]
    driver.add("r", golden.prompt(2))
    driver.prefill(group, {"r": [(last, 0, -1)] if dop == 1 else [(group[0], 0, 16), (last, 16, -1)]})
    driver.decode(group, {group[0]: ["r"]}, steps=12)
    golden.check(driver, "r", 2)


@pytest.mark.parametrize(("runtime", "dop"), every_cut_and_dop(), indirect=["runtime"], ids=cut_id)
def test_a_mixed_batch_on_every_dop_is_like_each_request_alone(driver, golden, dop):
    *_, last = group = driver.runtime.shape.all_instances[-dop:]
    driver.add("r", golden.prompt(2))
    driver.add("q", golden.prompt(1))
    driver.prefill(group, {"r": [(group[0], 0, -1)], "q": [(last, 0, -1)]})
    driver.decode(group, {last: ["r", "q"]}, steps=3)
    driver.decode(group, {last: ["q"], group[0]: ["r"]} if dop > 1 else {last: ["q", "r"]}, steps=6)
    golden.check(driver, "r", 2)
    golden.check(driver, "q", 1)


@pytest.mark.parametrize("runtime", [cut for cut in CUTS if cut[0] < 8], indirect=True, ids=cut_id)
def test_scale_down_scale_up_migration_and_preemption_change_nothing(driver, golden):
    """One request's eventful life, beside a batch mate that stays."""
    everyone = driver.runtime.shape.all_instances
    pair = left, last = everyone[-2:]
    driver.add("long", golden.prompt(2))
    driver.add("mate", golden.prompt(1))
    driver.prefill(everyone, {"long": [(left, 0, 16), (last, 16, -1)], "mate": [(last, 0, -1)]})
    driver.decode(pair, {last: ["long", "mate"]}, steps=2)
    driver.migrate("long", left, last, 16)
    driver.decode((last,), {last: ["long", "mate"]}, steps=2)
    driver.decode(everyone, {everyone[0]: ["long"], last: ["mate"]}, steps=3)
    driver.preempt("long")
    driver.decode((last,), {last: ["mate"]}, steps=2)
    driver.prefill(pair, {"long": [(last, 0, -1)]})
    driver.decode((last,), {last: ["mate", "long"]}, steps=2)
    driver.decode(pair, {left: ["long"], last: ["mate"]}, steps=3)
    assert [len(driver.tokens[name]) for name in ("long", "mate")] == [14, 15]
    golden.check(driver, "long", 2)
    golden.check(driver, "mate", 1)


@pytest.mark.parametrize("runtime", [cut for cut in CUTS if cut[0] == 8], indirect=True, ids=cut_id)
def test_preemption_changes_nothing_where_there_is_one_instance(driver, golden):
    driver.add("long", golden.prompt(2))
    driver.add("mate", golden.prompt(1))
    driver.prefill((0,), {"long": [(0, 0, -1)], "mate": [(0, 0, -1)]})
    driver.decode((0,), {0: ["long", "mate"]}, steps=3)
    driver.preempt("long")
    driver.decode((0,), {0: ["mate"]}, steps=2)
    driver.prefill((0,), {"long": [(0, 0, -1)]})
    driver.decode((0,), {0: ["mate", "long"]}, steps=3)
    golden.check(driver, "long", 2)
    golden.check(driver, "mate", 1)
