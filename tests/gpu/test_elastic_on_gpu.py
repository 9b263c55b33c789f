"""The same elastic histories on GPUs, and live against transformers."""

import json
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer

from loongjax.core.cluster import Group
from loongjax.core.sampling import SamplingParams
from loongjax.models.shipped import resolve_checkpoint
from loongjax.runtime.local import LocalRuntime
from needle.prompts import PromptWriter
from tests.checkpoints import BASE, VARIANTS, make_checkpoint
from tests.runtime.driver import Driver, Golden, poison_pool, small_runtime

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def runtime(tmp_path_factory, cache_dir) -> Iterator[LocalRuntime]:
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("gqa"), "gqa", with_tokenizer=False)
    runtime = small_runtime(checkpoint, cache_dir, dtype="float32")
    yield runtime
    runtime.close()


def test_the_default_backend_is_the_gpu():
    assert jax.default_backend() == "gpu"


@pytest.mark.parametrize("dop", range(1, 9))
def test_every_dop_gives_the_tokens_of_transformers(runtime, dop):
    if dop > runtime.shape.num_instances:
        pytest.skip(f"needs {dop} GPUs")
    golden, driver = Golden("gqa"), Driver(runtime)
    poison_pool(runtime)
    driver.add("r", golden.prompt(3))
    last = dop - 1
    driver.prefill(range(dop), {"r": [(0, 0, -1)] if dop == 1 else [(0, 0, 64), (last, 64, -1)]})
    driver.decode(range(dop), {last: ["r"]}, steps=12)
    golden.check(driver, "r", 3)


@pytest.mark.parametrize("chunk_tokens", [1, 7, 512])
def test_a_prompt_in_chunks_gives_the_tokens_of_transformers(runtime, chunk_tokens):
    golden, driver = Golden("gqa"), Driver(runtime)
    poison_pool(runtime)
    driver.add("r", golden.prompt(2), SamplingParams(temperature=0.0, max_tokens=None, logprobs=0))
    num_left = len(golden.prompt(2))
    while num_left:
        driver.extend(0, {"r": min(chunk_tokens, num_left)})
        num_left -= min(chunk_tokens, num_left)
    driver.extend(0, {"r": 1})
    driver.decode((0,), {0: ["r"]}, steps=11)
    golden.check(driver, "r", 2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_gives_the_tokens_of_transformers(variant, tmp_path, cache_dir):
    golden = Golden(variant)
    checkpoint = make_checkpoint(tmp_path, variant, with_tokenizer=False)
    runtime = small_runtime(checkpoint, cache_dir, dtype="float32", num_instances=1)
    driver = Driver(runtime)
    driver.add("r", golden.prompt(4))
    driver.add("q", golden.prompt(1))
    driver.prefill((0,), {"r": [(0, 0, -1)], "q": [(0, 0, -1)]})
    driver.decode((0,), {0: ["r", "q"]}, steps=16)
    golden.check(driver, "r", 4)
    golden.check(driver, "q", 1)
    runtime.close()


@pytest.mark.parametrize("variant", ["gqa", "rope_yarn", "bias"])
def test_fresh_weights_and_prompts_agree_with_transformers_live(variant, tmp_path, cache_dir):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    checkpoint = make_checkpoint(tmp_path, variant, seed=77, with_tokenizer=False)
    model = transformers.LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    prompt = np.random.default_rng(3).integers(2, (BASE | VARIANTS[variant])["vocab_size"] - 1, 200).tolist()

    runtime = small_runtime(checkpoint, cache_dir, dtype="float32", num_instances=1)
    driver = Driver(runtime)
    driver.add("r", prompt)
    driver.prefill((0,), {"r": [(0, 0, -1)]})
    driver.decode((0,), {0: ["r"]}, steps=20)
    runtime.close()

    tokens = torch.tensor([[*prompt, *driver.tokens["r"]]])
    with torch.no_grad():
        expected = torch.log_softmax(model(tokens).logits[0].double(), dim=-1).numpy()
    scored = [*driver.prompt_logprobs["r"], *driver.logprobs["r"]]
    following = tokens[0, 1:].numpy()
    found = [item.logprob for item in scored]
    np.testing.assert_allclose(found, expected[np.arange(len(following)), following], rtol=0, atol=2e-3)
    top2 = np.sort(expected, axis=-1)[len(prompt) - 1 : -1, -2:]
    is_clear = top2[:, 1] - top2[:, 0] > 1e-3
    greedy = expected[len(prompt) - 1 : -1].argmax(axis=-1)
    assert np.array_equal(greedy[is_clear], np.array(driver.tokens["r"])[is_clear])


def test_bfloat16_stays_within_its_bounds_of_float32_when_teacher_forced(tmp_path, cache_dir):
    golden = Golden("gqa_deep")
    checkpoint = make_checkpoint(tmp_path, "gqa_deep", with_tokenizer=False)
    scores = {}
    for dtype in ("float32", "bfloat16"):
        runtime = small_runtime(checkpoint, cache_dir, dtype=dtype, num_instances=1)
        driver = Driver(runtime)
        driver.add("r", golden.prompt(4))
        driver.prefill((0,), {"r": [(0, 0, -1)]})
        scores[dtype] = np.array([item.logprob for item in driver.prompt_logprobs["r"]])
        runtime.close()
    difference = np.abs(scores["bfloat16"] - scores["float32"])
    assert difference.mean() <= 0.02, json.dumps({"mean": float(difference.mean()), "max": float(difference.max())})
    assert difference.max() <= 0.2


def test_pool_shards_stay_where_they_are(runtime):
    golden, driver = Golden("gqa"), Driver(runtime)
    everyone = Group(runtime.shape.all_instances)

    def addresses() -> list[int]:
        view = runtime._kv_pool.view(everyone)
        return [shard.unsafe_buffer_pointer() for shard in runtime._grid.shards_of(everyone, view)]

    before = addresses()
    driver.add("r", golden.prompt(2))
    driver.prefill(everyone.instances, {"r": [(everyone.instances[-1], 0, -1)]})
    driver.decode(everyone.instances[-1:], {everyone.instances[-1]: ["r"]}, steps=4)
    driver.decode(everyone.instances, {0: ["r"]}, steps=4)
    assert addresses() == before
    assert jnp.dtype(runtime._kv_pool.view(everyone).dtype) == jnp.float32


def test_the_model_that_ships_finds_keys_on_the_kernels(cache_dir):
    """Its heads are of a size that decode's kernel takes: bfloat16 runs on it, float32 on plain jax."""
    folder = resolve_checkpoint(None)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    examples = PromptWriter(tokenizer, seed=9).examples(900, 0.3, 4)
    answers = [tokenizer.encode(found.answer, add_special_tokens=False).ids for found in examples]
    limits = {"num_instances": 1, "num_slots": 8192, "max_num_batched_tokens": 8192}
    scores = {}
    for dtype in ("float32", "bfloat16"):
        runtime = small_runtime(folder, cache_dir, dtype=dtype, **limits)
        driver = Driver(runtime)
        for i, found in enumerate(examples):
            driver.add(str(i), tokenizer.encode(found.prompt).ids)
        driver.prefill((0,), {name: [(0, 0, -1)] for name in driver.requests})
        driver.decode((0,), {0: list(driver.requests)}, steps=len(answers[0]) - 1)
        assert [driver.tokens[name] for name in driver.requests] == answers
        scores[dtype] = [item.logprob for name in driver.requests for item in driver.logprobs[name]]
        runtime.close()
    difference = np.abs(np.subtract(scores["bfloat16"], scores["float32"]))
    assert difference.mean() <= 0.02
    assert difference.max() <= 0.2
