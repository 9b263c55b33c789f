"""The initial weights: what the sketched heads attend to before any training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from needle.initial import DISTANCES, MATCHES, init_params
from needle.model import ModelConfig, hidden_states, param_shapes

CONFIG = ModelConfig()
LENGTH = 96


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, seed=0)


def attention_weights(params, tokens) -> list[np.ndarray]:
    """[N, T, T] of each layer."""
    weights = []

    def attend(q, k, v):
        scores = jnp.einsum("btnh,bsnh->bnts", q, k) * q.shape[3] ** -0.5
        probabilities = jax.nn.softmax(jnp.where(jnp.tri(LENGTH)[None, None] > 0, scores, -jnp.inf), axis=-1)
        weights.append(np.asarray(probabilities[0]))
        return jnp.einsum("bnts,bsnh->btnh", probabilities, v)

    positions = jnp.arange(LENGTH, dtype=jnp.int32)[None]
    hidden_states(params, CONFIG, jnp.asarray(tokens, jnp.int32)[None], positions, attend)
    return weights


def random_tokens(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(CONFIG.vocab_size)[:LENGTH]


def test_every_parameter_has_its_shape(params):
    assert {name: value.shape for name, value in params.items()} == param_shapes(CONFIG)
    assert all(np.isfinite(value).all() for value in params.values())


def test_heads_of_the_first_layer_look_their_distance_back(params):
    first, *_ = attention_weights(params, random_tokens(0))
    for head, distance in enumerate(DISTANCES):
        assert np.mean([first[head, t, t - distance] for t in range(20, LENGTH)]) > 0.5


@pytest.mark.parametrize("head", range(len(MATCHES)))
def test_heads_of_the_second_layer_prefer_what_stood_at_their_distances_tenfold(params, head):
    query_distance, key_distance = MATCHES[head]
    weights = []
    for seed in range(8):
        tokens = random_tokens(seed)
        query, key = LENGTH - 1, 30 + 3 * seed
        tokens[key - key_distance] = tokens[query - query_distance]
        _, second, *_ = attention_weights(params, tokens)
        weights.append(second[head, query, key])
    assert np.mean(weights) > 10 / LENGTH


def test_the_same_seed_gives_the_same_weights(params):
    again, other = init_params(CONFIG, seed=0), init_params(CONFIG, seed=1)
    assert all(np.array_equal(params[name], again[name]) for name in params)
    assert not np.array_equal(params["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
