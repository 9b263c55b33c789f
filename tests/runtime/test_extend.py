"""Chunked prefill against transformers: however a prompt is cut, and whoever is beside it, the tokens are the same."""

from collections.abc import Iterator

import pytest

from loongjax.core.sampling import SamplingParams
from loongjax.runtime.local import LocalRuntime
from tests.checkpoints import make_checkpoint
from tests.runtime.driver import Driver, Golden, poison_pool, small_runtime

GREEDY = SamplingParams(temperature=0.0, max_tokens=None, logprobs=0)
CUTS = [(1, 16), (2, 1), (2, 16)]
"""tp and page size. 8 devices make 8 / tp instances."""


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden("gqa")


@pytest.fixture(scope="module", params=CUTS, ids="tp{0[0]}-page{0[1]}".format)
def runtime(request, tmp_path_factory, cache_dir) -> Iterator[LocalRuntime]:
    tp, page_size = request.param
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("gqa"), "gqa", with_tokenizer=False)
    runtime = small_runtime(checkpoint, cache_dir, tp=tp, page_size=page_size)
    yield runtime
    runtime.close()


@pytest.fixture
def driver(runtime) -> Driver:
    poison_pool(runtime)
    return Driver(runtime)


def extend_whole(driver: Driver, name: str, chunk_tokens: int, *mates: str) -> None:
    """All of a prompt in chunks, beside a token for each mate in every one of them."""
    num_left = len(driver.requests[name].prompt_token_ids) + len(driver.tokens[name])
    while num_left:
        num_tokens = min(chunk_tokens, num_left)
        num_left -= num_tokens
        driver.extend(2, {**dict.fromkeys(mates, 1), name: num_tokens})


@pytest.mark.parametrize("chunk_tokens", [1, 7, 512])
def test_a_prompt_in_chunks_gives_the_tokens_of_transformers(driver, golden, chunk_tokens):
    driver.add("r", golden.prompt(2), GREEDY)
    extend_whole(driver, "r", chunk_tokens)
    assert len(driver.tokens["r"]) == 1
    driver.decode((2,), {2: ["r"]}, steps=12)
    golden.check(driver, "r", 2)


def test_a_decode_is_a_chunk_of_one(driver, golden):
    driver.add("r", golden.prompt(2), GREEDY)
    driver.prefill((2,), {"r": [(2, 0, -1)]})
    for _ in range(6):
        driver.extend(2, {"r": 1})
    driver.decode((2,), {2: ["r"]}, steps=6)
    golden.check(driver, "r", 2)


def test_decodes_beside_chunks_are_like_each_request_alone(driver, golden):
    driver.add("short", golden.prompt(1), GREEDY)
    driver.add("one", golden.prompt(0), GREEDY)
    driver.add("long", golden.prompt(3), GREEDY)
    driver.extend(2, {"short": -1, "one": -1})
    extend_whole(driver, "long", 29, "one", "short")
    driver.decode((2,), {2: ["long", "short", "one"]}, steps=3)
    driver.extend(2, {"long": 1, "one": 1, "short": 1})
    for name, i in {"one": 0, "short": 1, "long": 3}.items():
        golden.check(driver, name, i)


@pytest.mark.parametrize("chunk_tokens", [7, 40])
def test_chunks_and_decodes_await_the_tokens_of_what_is_before_them(driver, golden, chunk_tokens):
    """Two iterations are in flight all the time: extends behind extends, and decodes before and behind them."""
    driver.add("short", golden.prompt(1), GREEDY)
    driver.add("one", golden.prompt(0), GREEDY)
    driver.add("long", golden.prompt(3), GREEDY)
    driver.extend(2, {"short": -1, "one": -1}, lands=False)
    driver.decode((2,), {2: ["one", "short"]}, lands=False)
    driver.land()
    num_left = len(golden.prompt(3))
    while num_left:
        num_tokens = min(chunk_tokens, num_left)
        num_left -= num_tokens
        driver.extend(2, {"short": 1, "long": num_tokens, "one": 1}, lands=False)
        driver.land()
    driver.extend(2, {"one": 1, "long": 1}, lands=False)
    driver.land()
    driver.decode((2,), {2: ["long", "one"]}, lands=False)
    driver.land()
    driver.land()
    driver.decode((2,), {2: ["long", "one"]}, steps=3)
    for name, i in {"one": 0, "short": 1, "long": 3}.items():
        golden.check(driver, name, i)


def test_chunks_of_several_prompts_share_an_iteration(driver, golden):
    driver.add("a", golden.prompt(2), GREEDY)
    driver.add("b", golden.prompt(3), GREEDY)
    driver.extend(2, {"a": 13, "b": 40})
    driver.extend(2, {"b": 31, "a": -1})
    driver.extend(2, {"a": 1, "b": -1})
    driver.decode((2,), {2: ["a", "b"]}, steps=6)
    golden.check(driver, "a", 2)
    golden.check(driver, "b", 3)


def test_a_request_preempted_amid_its_prompt_or_its_output_starts_again(driver, golden):
    driver.add("r", golden.prompt(2), GREEDY)
    driver.add("mate", golden.prompt(1), GREEDY)
    driver.extend(2, {"mate": -1, "r": 11})
    driver.preempt("r")
    extend_whole(driver, "r", 17, "mate")
    driver.extend(2, {"r": 1, "mate": 1})
    driver.preempt("r")
    extend_whole(driver, "r", 9, "mate")
    driver.decode((2,), {2: ["mate", "r"]}, steps=3)
    golden.check(driver, "r", 2)
    golden.check(driver, "mate", 1)


def test_only_requests_whose_last_token_is_computed_are_sampled(driver, golden):
    driver.add("a", golden.prompt(2), GREEDY)
    driver.add("b", golden.prompt(1), GREEDY)
    driver.extend(2, {"a": 8, "b": 3}, lands=False)
    driver.extend(2, {"a": 8, "b": -1}, lands=False)
    assert driver.land().tokens == ()
    assert [token.request_id for token in driver.land().tokens] == ["b"]


def test_a_sample_depends_on_seed_and_position_only(driver, golden):
    """So chunks, which end elsewhere, sample what a prefill and decodes do."""
    sampled = SamplingParams(temperature=1.0, top_p=0.9, presence_penalty=0.5, max_tokens=None)
    driver.add("chunks", golden.prompt(2), sampled, seed=11)
    driver.add("whole", golden.prompt(2), sampled, seed=11)
    driver.prefill((2,), {"whole": [(2, 0, -1)]})
    driver.decode((2,), {2: ["whole"]}, steps=5)
    extend_whole(driver, "chunks", 10)
    for _ in range(5):
        driver.extend(2, {"chunks": 1})
    assert driver.tokens["chunks"] == driver.tokens["whole"]
