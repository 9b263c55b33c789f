"""Elastic execution against transformers: whatever a request's history, its tokens and log-probabilities are equal."""

from collections.abc import Iterator

import jax
import numpy as np
import pytest

from loongjax.core.cluster import Group
from loongjax.core.sampling import SamplingParams
from loongjax.runtime.local import LocalRuntime
from tests.checkpoints import make_checkpoint
from tests.runtime.driver import LOGPROB_TOLERANCE, Driver, Golden, poison_pool, small_runtime


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden("gqa")


@pytest.fixture(scope="module", params=[1, 16], ids="page{}".format)
def runtime(request, tmp_path_factory, cache_dir) -> Iterator[LocalRuntime]:
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("gqa"), "gqa", with_tokenizer=False)
    runtime = small_runtime(checkpoint, cache_dir, page_size=request.param)
    yield runtime
    runtime.close()


@pytest.fixture
def driver(runtime) -> Driver:
    poison_pool(runtime)
    return Driver(runtime)


@pytest.mark.parametrize("dop", range(1, 9))
def test_every_dop_gives_the_tokens_of_transformers(driver, golden, dop):
    driver.add("r", golden.prompt(2))
    group = range(8 - dop, 8)
    first = 8 - dop
    driver.prefill(group, {"r": [(first, 0, -1)]} if dop == 1 else {"r": [(first, 0, 16), (7, 16, -1)]})
    driver.decode(group, {first: ["r"]}, steps=12)
    golden.check(driver, "r", 2)


@pytest.mark.parametrize("dop", range(1, 9))
def test_a_mixed_batch_on_every_dop_is_like_each_request_alone(driver, golden, dop):
    *_, last = group = range(8 - dop, 8)
    first = 8 - dop
    driver.add("r", golden.prompt(2))
    driver.add("q", golden.prompt(1))
    driver.prefill(group, {"r": [(first, 0, -1)], "q": [(last, 0, -1)]})
    driver.decode(group, {first: ["r"], last: ["q"]} if dop > 1 else {last: ["q", "r"]}, steps=9)
    golden.check(driver, "r", 2)
    golden.check(driver, "q", 1)


def test_scale_down_scale_up_migration_and_preemption_change_nothing(driver, golden):
    """One request's eventful life, beside a batch mate that comes and goes."""
    driver.add("long", golden.prompt(3))
    driver.add("mate", golden.prompt(1))
    driver.prefill((1, 2, 3, 4, 6), {"long": [(2, 0, 64), (6, 64, -1)], "mate": [(6, 0, -1)]})
    driver.decode((2, 6), {6: ["long", "mate"]}, steps=3)
    driver.decode((2, 5, 6), {5: ["long"], 6: ["mate"]}, steps=3)
    driver.migrate("long", 2, 6, 33)
    driver.decode((2, 5, 6), {2: ["long"], 6: ["mate"]}, steps=2)
    driver.decode((2, 5, 6), {5: ["mate", "long"]}, steps=3)
    driver.preempt("long")
    driver.decode((5, 6), {6: ["mate"]}, steps=2)
    driver.prefill((0, 7), {"long": [(7, 0, -1)]})
    driver.decode((0, 7), {0: ["long"]}, steps=4)
    driver.decode((7, 0), {7: ["long"]}, steps=3)
    golden.check(driver, "long", 3)
    golden.check(driver, "mate", 1)
    assert len(driver.tokens["long"]) == 20


def test_growing_to_every_dop_and_shrinking_from_each_changes_nothing(driver, golden):
    """Up by scale-up, one master more at a time; down by preemption, prefill on all, and scale-down."""
    groups = {dop: tuple(range(8 - dop, 8)) for dop in range(1, 9)}
    driver.add("long", golden.prompt(2))
    driver.add("mate", golden.prompt(1))
    driver.prefill(groups[8], {"long": [(7, 0, -1)], "mate": [(7, 0, -1)]})
    driver.decode(groups[1], {7: ["long", "mate"]}, steps=2)
    for dop in range(2, 9):
        driver.decode(groups[dop], {8 - dop: ["long"], 7: ["mate"]}, steps=2)
    for dop in range(8, 2, -1):
        driver.preempt("long")
        driver.prefill(groups[dop], {"long": [(7, 0, -1)]})
        driver.decode(groups[dop - 1], {9 - dop: ["long"], 7: ["mate"]})
    assert [len(driver.tokens[name]) for name in ("long", "mate")] == [29, 23]
    golden.check(driver, "long", 2)
    golden.check(driver, "mate", 1)


def test_a_mixed_batch_with_one_token_prompts_is_like_each_alone(driver, golden):
    names = {f"r{i}": i for i in (0, 1, 2, 3)}
    for name, i in names.items():
        driver.add(name, golden.prompt(i))
    kept = {"r0": [(1, 0, -1)], "r1": [(3, 0, -1)], "r2": [(3, 0, 32), (1, 32, -1)], "r3": [(0, 0, 80), (3, 80, -1)]}
    driver.prefill((0, 1, 3), kept)
    driver.decode((0, 1, 3), {0: ["r2"], 1: ["r3", "r0"], 3: ["r1"]}, steps=6)
    driver.decode((0, 1, 3), {3: ["r0", "r1", "r2", "r3"]}, steps=6)
    for name, i in names.items():
        golden.check(driver, name, i)


def test_fewer_tokens_than_ranks_prefill_right(driver, golden):
    driver.add("one", golden.prompt(0))
    driver.add("seven", golden.prompt(1))
    driver.prefill(range(8), {"one": [(0, 0, -1)]})
    driver.prefill(range(8), {"seven": [(7, 0, -1)]})
    driver.decode((0, 7), {7: ["one"], 0: ["seven"]}, steps=5)
    golden.check(driver, "one", 0)
    golden.check(driver, "seven", 1)


def test_a_request_without_output_gets_only_its_prompts_logprobs(driver, golden):
    driver.add("r", golden.prompt(2), SamplingParams(max_tokens=0, prompt_logprobs=3))
    driver.prefill((2, 3, 4), {"r": []})
    assert driver.tokens["r"] == []
    scored = driver.prompt_logprobs["r"]
    np.testing.assert_allclose(
        [item.logprob for item in scored], golden._arrays["prompt_logprobs_2"], rtol=0, atol=LOGPROB_TOLERANCE
    )
    assert all(len(item.top) == 3 and item.top[0][1] >= item.top[1][1] >= item.top[2][1] for item in scored)


def test_a_page_table_that_outgrows_its_room_is_laid_out_anew(driver, golden):
    driver.add("r", golden.prompt(2))
    driver.prefill((4,), {"r": [(4, 0, -1)]})
    driver.decode((4,), {4: ["r"]}, steps=2)
    driver.runtime._decodes[Group((4,))].num_steps = 0
    driver.decode((4,), {4: ["r"]}, steps=10)
    golden.check(driver, "r", 2)


@pytest.mark.parametrize(
    ("instances", "batches"),
    [
        ((4,), {4: ["r0", "r1", "r2", "r3"]}),
        ((4,), {4: ["r3", "old", "r1"]}),
        ((0, 1, 3), {0: ["r2", "r0", "old"], 3: ["r1"]}),
        ((0, 1), {1: ["r2", "r3", "old", "r0"]}),
    ],
)
def test_a_decode_awaits_the_tokens_of_the_prefill_before_it(driver, golden, instances, batches):
    """Behind each other on the devices: a decode, a prefill of others, and a decode of all or some of them, each master
    of whichever the prefill sampled wherever.
    """
    driver.add("old", golden.prompt(1))
    driver.prefill(instances, {"old": [(instances[0], 0, -1)]})
    driver.decode(instances, {instances[-1]: ["old"]}, steps=2)
    driver.decode(instances, {instances[-1]: ["old"]}, lands=False)
    names = {"r0": 0, "r1": 1, "r2": 2, "r3": 0}
    for name, i in names.items():
        driver.add(name, golden.prompt(i))
    kept = {name: [(instances[j % len(instances)], 0, -1)] for j, name in enumerate(names)}
    driver.prefill(instances, kept, lands=False)
    driver.land()
    driver.decode(instances, batches, lands=False)
    driver.land()
    driver.land()
    driver.decode(instances, batches, steps=8)
    for name, i in {**names, "old": 1}.items():
        golden.check(driver, name, i)


def test_samples_that_a_decode_awaits_are_those_of_a_decode_that_does_not(driver, golden):
    def decoded(*, lands: bool) -> Driver:
        each = Driver(driver.runtime)
        sampling = SamplingParams(temperature=1.0, top_p=0.9, logprobs=1, min_tokens=4, max_tokens=30)
        for i in range(3):
            each.add(f"r{i}", golden.prompt(i), sampling, seed=i)
        each.prefill((2, 5), {f"r{i}": [(5, 0, -1)] for i in range(3)}, lands=lands)
        each.decode((2, 5), {2: ["r1"], 5: ["r0", "r2"]}, lands=lands)
        for _ in range(0 if lands else 2):
            each.land()
        each.decode((2, 5), {2: ["r1"], 5: ["r0", "r2"]}, steps=4)
        for i in range(3):
            each.kv.release(f"r{i}")
        return each

    awaited, known = decoded(lands=False), decoded(lands=True)
    assert awaited.tokens == known.tokens
    assert all(len(tokens) == 6 for tokens in known.tokens.values())
    assert awaited.logprobs == known.logprobs


PENALISED = SamplingParams(temperature=0.0, frequency_penalty=0.5, presence_penalty=0.3, logprobs=2, max_tokens=30)


@pytest.mark.parametrize(
    ("instances", "batches"),
    [
        ((4,), {4: ["r0", "r1", "r2", "r3"]}),
        ((0, 1, 3), {0: ["r2", "r0"], 3: ["r1", "r3"]}),
        ((0, 1), {0: ["r1"], 1: ["r0", "r2", "r3"]}),
    ],
)
def test_those_who_are_left_go_on_with_what_the_devices_hold(driver, golden, instances, batches):
    """One after the other leaves. Their rows have no keys any more, and their pages go to others."""
    names = {"r0": 0, "r1": 1, "r2": 2, "r3": 0}
    for name, i in names.items():
        driver.add(name, golden.prompt(i))
    driver.prefill(instances, {name: [(instances[j % len(instances)], 0, -1)] for j, name in enumerate(names)})
    driver.decode(instances, batches, steps=2)
    held = driver.runtime._decodes[Group(instances)]
    for leaves in ("r0", "r3", "r1"):
        driver.finish(leaves)
        batches = {master: [name for name in batch if name != leaves] for master, batch in batches.items()}
        batches = {master: batch for master, batch in batches.items() if batch}
        driver.decode(instances, batches, steps=3)
        assert driver.runtime._decodes[Group(instances)] is held, "nothing was begun again"
        num_keys = sum(driver.kv.num_tokens(name) for batch in batches.values() for name in batch)
        assert np.asarray(held.state.kv_lens).sum() == num_keys
    held.num_steps = 0
    driver.decode(instances, batches, steps=3)
    for name, i in names.items():
        golden.check(driver, name, i)


def test_those_who_are_left_keep_their_penalties_and_log_probabilities(driver, golden):
    def decoded(leaves: bool) -> Driver:
        each = Driver(driver.runtime)
        for i in range(3):
            each.add(f"r{i}", golden.prompt(i), PENALISED)
        each.prefill((5,), {f"r{i}": [(5, 0, -1)] for i in range(3)})
        each.decode((5,), {5: ["r0", "r1", "r2"]}, steps=4)
        if leaves:
            each.finish("r1")
        each.decode((5,), {5: ["r0", "r2"] if leaves else ["r0", "r1", "r2"]}, steps=6)
        for name in ("r0", "r2"):
            each.kv.release(name)
        return each

    alone, beside = decoded(leaves=True), decoded(leaves=False)
    for name in ("r0", "r2"):
        assert alone.tokens[name] == beside.tokens[name]
        for one, other in zip(alone.logprobs[name], beside.logprobs[name], strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=LOGPROB_TOLERANCE)
            assert [token for token, _ in one.top] == [token for token, _ in other.top]


def test_steady_steps_reuse_what_the_devices_hold(driver, golden):
    driver.add("r", golden.prompt(2))
    driver.prefill((4,), {"r": [(4, 0, -1)]})
    driver.decode((4,), {4: ["r"]}, steps=1)
    before = driver.runtime._decodes[Group((4,))]
    driver.decode((4,), {4: ["r"]}, steps=5)
    assert driver.runtime._decodes[Group((4,))] is before


def test_pages_of_64_tokens_give_the_tokens_of_transformers(tmp_path, cache_dir):
    golden = Golden("gqa")
    runtime = small_runtime(make_checkpoint(tmp_path, "gqa", with_tokenizer=False), cache_dir, page_size=64)
    driver = Driver(runtime)
    poison_pool(runtime)
    driver.add("r", golden.prompt(3))
    driver.prefill((0, 1, 2), {"r": [(2, 0, 128), (1, 128, -1)]})
    driver.decode((1, 2), {1: ["r"]}, steps=6)
    driver.migrate("r", 2, 1, 70)
    driver.decode((1, 2), {2: ["r"]}, steps=6)
    golden.check(driver, "r", 3)
    runtime.close()


@pytest.mark.parametrize(("variant", "tp"), [("gqa_deep", 2), ("bias", 2), ("tied", 4), ("odd_vocab", 4)])
def test_tensor_parallel_instances_give_the_tokens_of_transformers(variant, tp, tmp_path, cache_dir):
    golden = Golden(variant)
    runtime = small_runtime(make_checkpoint(tmp_path, variant, with_tokenizer=False), cache_dir, tp=tp)
    driver = Driver(runtime)
    poison_pool(runtime)
    driver.add("r", golden.prompt(2))
    driver.add("q", golden.prompt(1))
    driver.prefill((0, 1), {"r": [(1, 0, 32), (0, 32, -1)], "q": [(1, 0, -1)]})
    driver.decode((0, 1), {0: ["r"], 1: ["q"]}, steps=6)
    driver.decode((0, 1), {1: ["r", "q"]}, steps=6)
    golden.check(driver, "r", 2)
    golden.check(driver, "q", 1)
    runtime.close()


@pytest.mark.parametrize(
    "variant", ["head_dim", "config_v4", "rope_linear", "rope_llama3", "rope_yarn", "rope_yarn_mscale"]
)
def test_every_rope_and_head_dim_gives_the_tokens_of_transformers(variant, tmp_path, cache_dir):
    golden = Golden(variant)
    runtime = small_runtime(make_checkpoint(tmp_path, variant, with_tokenizer=False), cache_dir)
    driver = Driver(runtime)
    driver.add("r", golden.prompt(4))
    driver.prefill((0, 1, 2), {"r": [(1, 0, 160), (2, 160, -1)]})
    driver.decode((1, 2), {2: ["r"]}, steps=10)
    driver.decode((1, 2, 3), {3: ["r"]}, steps=6)
    golden.check(driver, "r", 4)
    runtime.close()


def test_closing_a_second_time_does_nothing(tmp_path, cache_dir):
    runtime = small_runtime(make_checkpoint(tmp_path, "gqa", with_tokenizer=False), cache_dir)
    runtime.close()
    count = runtime.num_recompiles
    runtime.close()
    jax.jit(lambda: 17)()
    assert runtime.num_recompiles == count
