"""Every transformation, alone and together, against float64; what a sample may depend on; and its distribution."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loongjax.runtime.sampling import TIERS, SamplerInput, SamplerVariant, build_rows
from loongjax.runtime.sampling.counts import TokenCounts, count_history, token_histories
from loongjax.runtime.sampling.sample import sample
from tests.runtime.sampling.oracle import edited_logits, kept, make_input, plausible_tokens, position_of

VOCAB = 23
FULL = TIERS[-1]

sample_jit = jax.jit(sample, static_argnames="with_logprobs")


def counts_of(inputs, batch_size, vocab_size) -> TokenCounts:
    shape = (batch_size, vocab_size)
    counts = TokenCounts(output=jnp.zeros(shape, jnp.int32), in_prompt=jnp.zeros(shape, jnp.bool_))
    for history in token_histories([inputs], batch_size):
        counts = count_history(counts, on_shard(history))
    return counts


def draw(logits, inputs, variant: SamplerVariant, batch_size: int):
    """Samples once for a batch on one shard."""
    _, rows = build_rows([inputs], batch_size, variant)
    padded = np.zeros((batch_size, logits.shape[1]), np.float32)
    padded[: len(inputs)] = logits
    positions = np.zeros(batch_size, np.int32)
    positions[: len(inputs)] = [position_of(item) for item in inputs]
    counts = counts_of(inputs, batch_size, logits.shape[1]) if variant.has_penalties else None
    return sample_jit(padded, positions, on_shard(rows), counts, with_logprobs=variant.has_logprobs)


def tokens(logits, inputs, *, variant: SamplerVariant = FULL, batch_size=8) -> list[int]:
    """The sampled tokens, in batches of a size that is compiled once for all tests."""
    drawn = []
    for start in range(0, len(inputs), batch_size):
        part = slice(start, start + batch_size)
        result = draw(logits[part], inputs[part], variant, batch_size)
        drawn += np.asarray(result.token_ids)[: len(inputs[part])].tolist()
    return drawn


def on_shard(tree):
    return jax.tree.map(lambda leaf: leaf[0], tree)


def random_logits(num_rows, vocab_size=VOCAB, seed=0, scale=2.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(scale=scale, size=(num_rows, vocab_size)).astype(np.float32)


ids = st.integers(0, VOCAB - 1)
arguments_of_all_kinds = st.fixed_dictionaries(
    {
        "prompt": st.lists(ids, min_size=1, max_size=8),
        "output": st.lists(ids, max_size=8),
        "seed": st.integers(-(2**63), 2**63 - 1),
        "stop_ids": st.lists(ids, max_size=4),
        "temperature": st.sampled_from([0.0, 1.0]) | st.floats(0.05, 5.0),
        "top_k": st.sampled_from([0, 1, 2, 5, 22, 23, 100]),
        "top_p": st.just(1.0) | st.floats(0.01, 1.0),
        "min_p": st.just(0.0) | st.floats(0.0, 1.0),
        "min_tokens": st.integers(0, 10),
        "presence_penalty": st.just(0.0) | st.floats(-2.0, 2.0),
        "frequency_penalty": st.just(0.0) | st.floats(-2.0, 2.0),
        "repetition_penalty": st.just(1.0) | st.floats(0.5, 2.0),
        "logit_bias": st.dictionaries(st.integers(0, 2 * VOCAB), st.floats(-10.0, 10.0), max_size=5),
    }
)


@settings(deadline=None, max_examples=40)
@given(arguments=st.lists(arguments_of_all_kinds, min_size=4, max_size=4), seed=st.integers(0, 2**32 - 1))
def test_all_parameters_together_sample_what_float64_samples(arguments, seed):
    inputs, logits = [make_input(**kwargs) for kwargs in arguments], random_logits(4, seed=seed)
    for row, token in enumerate(tokens(logits, inputs)):
        assert token in plausible_tokens(logits[row], inputs[row])


@pytest.mark.parametrize("variant", TIERS, ids=lambda variant: variant.name)
def test_every_variant_samples_the_same_token_where_it_serves(variant):
    params: dict[str, Any] = {"temperature": 0.8} if variant.has_noise else {"temperature": 0.0}
    if variant.has_filters:
        params["top_p"] = 0.8
    inputs = [make_input(seed=seed, **params) for seed in range(8)]
    logits = random_logits(8)
    assert tokens(logits, inputs, variant=variant) == tokens(logits, inputs, variant=FULL)


def test_a_request_samples_alike_in_every_place_of_every_batch_and_bucket():
    inputs = [
        make_input(seed=seed, temperature=0.5 + seed / 4, top_p=1 - seed / 20, presence_penalty=seed / 8)
        for seed in range(8)
    ]
    logits = random_logits(8, scale=0.5)
    expected = tokens(logits, inputs)
    for batch_size in (4, 8):
        order = np.random.default_rng(batch_size).permutation(8)
        shuffled = tokens(logits[order], [inputs[row] for row in order], batch_size=batch_size)
        assert shuffled == [expected[row] for row in order]
    for row in (0, 5):
        assert tokens(logits[row : row + 1], [inputs[row]]) == [expected[row]]


@pytest.mark.parametrize("padding", [1, 41])
def test_padding_of_the_vocabulary_changes_nothing_and_is_never_sampled(padding):
    inputs = [
        make_input(seed=seed, temperature=3.0, top_p=1 - seed / 50, logit_bias={VOCAB: 100.0}) for seed in range(32)
    ]
    logits = random_logits(32, scale=0.3)
    padded = np.pad(logits, ((0, 0), (0, padding)), constant_values=-np.inf)
    assert tokens(padded, inputs) == tokens(logits, inputs)


def test_the_next_position_and_another_seed_draw_anew():
    logits = np.zeros((3, VOCAB), np.float32)
    inputs = [make_input(seed=1), make_input(seed=1, output=(5,)), make_input(seed=2)]
    assert tokens(logits, inputs) == [plausible_tokens(logits[0], item).pop() for item in inputs]
    assert len(set(tokens(logits, inputs))) == 3


def test_greedy_takes_the_lowest_id_of_equal_logits():
    logits = np.zeros((2, VOCAB), np.float32)
    logits[1, [7, 9]] = 3.0
    inputs = [make_input(temperature=0.0), make_input(temperature=0.0)]
    for variant in TIERS:
        assert tokens(logits, inputs, variant=variant) == [0, 7]


def test_greedy_rows_ignore_the_noise_of_their_batch_mates():
    logits = random_logits(8, scale=0.01)
    inputs = [make_input(temperature=0.0 if row % 2 else 5.0, seed=row) for row in range(8)]
    assert tokens(logits, inputs)[1::2] == logits.argmax(axis=1)[1::2].tolist()


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1.2e-38, 1e-10])
def test_the_smallest_temperatures_are_greedy_and_do_not_overflow(temperature):
    logits = random_logits(8, scale=50)
    inputs = [make_input(temperature=temperature, seed=seed, top_p=0.9) for seed in range(8)]
    assert tokens(logits, inputs) == logits.argmax(axis=1).tolist()


def test_the_highest_temperature_is_uniform_over_what_is_not_banned():
    logits = random_logits(64, scale=50)
    logits[:, ::2] = -np.inf
    drawn = tokens(logits, [make_input(temperature=1e300, seed=seed) for seed in range(64)])
    assert all(token % 2 for token in drawn)
    assert len(set(drawn)) > 8


def test_the_only_finite_logit_is_sampled_whatever_the_parameters():
    logits = np.full((5, VOCAB), -np.inf, np.float32)
    logits[np.arange(5), [0, 22, 7, 7, 3]] = -1e4
    inputs = [
        make_input(temperature=0.0),
        make_input(temperature=2.0),
        make_input(top_p=0.01, top_k=3),
        make_input(min_p=1.0, repetition_penalty=5.0, prompt=(7,)),
        make_input(logit_bias={3: -100.0, 4: 100.0}, presence_penalty=2.0, output=(3, 3)),
    ]
    assert tokens(logits, inputs) == [0, 22, 7, 7, 3]


def test_a_row_of_nothing_gives_token_zero():
    logits = np.full((2, VOCAB), -np.inf, np.float32)
    for variant in TIERS:
        assert tokens(logits, [make_input(temperature=0.0), make_input()], variant=variant) == [0, 0]


def test_a_bias_of_100_forces_and_of_minus_100_forbids():
    logits = random_logits(32)
    forced = [make_input(logit_bias={11: 100.0}, seed=seed) for seed in range(32)]
    assert set(tokens(logits, forced)) == {11}
    others = dict.fromkeys(set(range(VOCAB)) - {4}, -100.0)
    assert set(tokens(logits[:4], [make_input(logit_bias=others, seed=seed) for seed in range(4)])) == {4}


def test_stop_tokens_are_banned_until_min_tokens_and_no_longer():
    logits = np.zeros((8, VOCAB), np.float32)
    logits[:, [3, 8, 15]] = [50, 40, 30]
    item = make_input(temperature=0.0, min_tokens=3, stop_ids=(3, 8))
    _, rows = build_rows([[item] * 8], 8, FULL)
    positions = position_of(item) + np.arange(8, dtype=np.int32)
    drawn = sample_jit(logits, positions, on_shard(rows), counts_of([], 8, VOCAB), with_logprobs=True).token_ids
    assert np.asarray(drawn).tolist() == [15, 15, 15, 3, 3, 3, 3, 3]


def test_counts_kept_over_steps_equal_counts_of_the_whole_history():
    item = make_input(prompt=(1, 1, 2), frequency_penalty=0.7, repetition_penalty=1.3, temperature=1.5, seed=3)
    mate = make_input(prompt=(5,), presence_penalty=1.9, temperature=2.0, seed=4)
    inputs = [item, mate]
    _, rows = build_rows([inputs], 8, FULL)
    counts = counts_of(inputs, 8, VOCAB)
    for step in range(6):
        logits = random_logits(8, seed=step)
        positions = np.array([*map(position_of, inputs), *[0] * 6], np.int32)
        result = sample_jit(logits, positions, on_shard(rows), counts, with_logprobs=True)
        counts = result.counts
        drawn = np.asarray(result.token_ids).tolist()
        for row in range(2):
            assert drawn[row] in plausible_tokens(logits[row], inputs[row])
            inputs[row] = SamplerInput(inputs[row].request, (*inputs[row].output_token_ids, drawn[row]))
        fresh = counts_of(inputs, 8, VOCAB)
        np.testing.assert_array_equal(counts.output[:2], fresh.output[:2])
        np.testing.assert_array_equal(counts.in_prompt[:2], fresh.in_prompt[:2])


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.6},
        {"temperature": 2.0, "top_k": 9},
        {"temperature": 1.3, "top_p": 0.85},
        {"temperature": 1.0, "top_k": 12, "top_p": 0.9, "min_p": 0.05, "logit_bias": {2: 3.0}, "output": (5, 5)},
        {"temperature": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.2, "output": (5, 5, 7)},
    ],
    ids=lambda params: "-".join(params),
)
def test_frequencies_follow_the_target_distribution(params):
    item = make_input(**params)
    logits = random_logits(1, seed=5)[0]
    edited = edited_logits(logits, item)
    tempered = (edited - edited.max()) / params["temperature"]
    mask = kept(tempered, params.get("top_k", 0), params.get("top_p", 1.0), params.get("min_p", 0.0))
    target = np.where(mask, np.exp(tempered), 0.0)
    target /= target.sum()

    num_draws = 16384
    observed = np.bincount(draw_many(logits, item, num_draws), minlength=VOCAB)
    assert observed[target == 0].sum() == 0
    common = target * num_draws > 5
    expected, seen = target[common] * num_draws, observed[common]
    chi_square = ((seen - expected) ** 2 / expected).sum()
    # The 99.9th percentile of chi-square, by the Wilson-Hilferty approximation; draws are fixed, so this cannot flake.
    freedom = max(common.sum() - 1, 1)
    assert chi_square < freedom * (1 - 2 / (9 * freedom) + 3.09 * np.sqrt(2 / (9 * freedom))) ** 3


@jax.jit
@functools.partial(jax.vmap, in_axes=(None, 0, None, None))
def sample_at(logits, position, rows, counts):
    return sample(logits, position[None], rows, counts).token_ids[0]


def draw_many(logits, item, num_draws) -> np.ndarray:
    """Draws of one request at many positions."""
    _, rows = build_rows([[item]], 1, FULL)
    positions = jnp.arange(100, 100 + num_draws, dtype=jnp.int32)
    return np.asarray(sample_at(jnp.asarray(logits)[None], positions, on_shard(rows), counts_of([item], 1, VOCAB)))
