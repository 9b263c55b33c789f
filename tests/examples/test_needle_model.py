"""The network that is trained: it is the Llama that loongjax serves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from loongjax.models.checkpoint import load_weights
from loongjax.models.config import ModelConfig as ServedConfig
from loongjax.models.llama import Llama
from needle.model import (
    QUERY_BLOCK,
    ModelConfig,
    hidden_states,
    load_params,
    logits,
    param_shapes,
    plain_attention,
    save_checkpoint,
)

SMALL = ModelConfig(num_layers=2, hidden_size=32, intermediate_size=48, head_dim=8, vocab_size=64, max_model_len=512)


def random_params(config, seed=0):
    rng = np.random.default_rng(seed)
    shapes = param_shapes(config)
    return {name: jnp.asarray(rng.normal(0.0, 0.3, shape), jnp.float32) for name, shape in shapes.items()}


def positions_of(tokens):
    return jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)


def forward(params, config, tokens):
    with jax.default_matmul_precision("highest"):
        return logits(params, hidden_states(params, config, tokens, positions_of(tokens), plain_attention))


def dense_attention(q, k, v):
    """float64 numpy: softmax over keys at or before each query."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[3])
    scores = np.where(np.tri(q.shape[1])[None, None] > 0, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("bnts,bsnh->btnh", weights / weights.sum(axis=-1, keepdims=True), v)


@pytest.mark.parametrize("length", [1, 7, QUERY_BLOCK, QUERY_BLOCK + 3])
@pytest.mark.parametrize("num_kv_heads", [2, 1])
def test_attention_in_blocks_is_attention(length, num_kv_heads):
    rng = np.random.default_rng(length)
    q = rng.normal(size=(1, length, 2, 8)).astype(np.float32)
    k, v = (rng.normal(size=(1, length, num_kv_heads, 8)).astype(np.float32) for _ in "kv")
    with jax.default_matmul_precision("highest"):
        out = plain_attention(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v))
    np.testing.assert_allclose(out, dense_attention(q, k, v), atol=1e-5)


@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_its_checkpoint_is_served_with_the_same_logits(tmp_path, num_kv_heads):
    config = dataclasses.replace(SMALL, num_kv_heads=num_kv_heads)
    save_checkpoint(random_params(config), config, tmp_path)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (1, 40)), jnp.int32)
    expected = served_logits(tmp_path, tokens[0])
    np.testing.assert_allclose(forward(load_params(tmp_path), config, tokens)[0], expected, atol=2e-4)


def served_logits(checkpoint, token_ids):
    """float32 [T, V], by the model that loongjax serves, which is held to transformers elsewhere."""
    config = ServedConfig.from_checkpoint(checkpoint)
    [[state]] = load_weights(checkpoint, config, dtype="float32", devices=[jax.devices()[:1]])
    model = nnx.eval_shape(lambda: Llama(config, dtype="float32", rngs=nnx.Rngs(0)))
    llama = nnx.merge(nnx.graphdef(model), state)

    def attend(layer, q, k, v, carry):
        return jnp.asarray(dense_attention(q[None], k[None], v[None])[0], jnp.float32), carry

    hidden, _ = llama.hidden(token_ids, jnp.arange(len(token_ids), dtype=jnp.int32), attend, None)
    return llama.logits(hidden)


def test_the_config_says_what_the_parameters_are(tmp_path):
    save_checkpoint(random_params(SMALL), SMALL, tmp_path)
    served = ServedConfig.from_checkpoint(tmp_path)
    for name in ("hidden_size", "intermediate_size", "num_layers", "num_q_heads", "num_kv_heads", "head_dim"):
        assert getattr(served, name) == getattr(SMALL, name)
    assert served.tie_word_embeddings
    assert served.dtype == "bfloat16"
    assert served.rope.theta == SMALL.rope_theta
    assert served.max_position_embeddings == SMALL.max_model_len


def test_stored_parameters_come_back_rounded_to_bfloat16(tmp_path):
    params = random_params(SMALL, seed=3)
    save_checkpoint(params, SMALL, tmp_path)
    loaded = load_params(tmp_path)
    assert {name: value.shape for name, value in loaded.items()} == param_shapes(SMALL)
    for name, value in params.items():
        np.testing.assert_array_equal(loaded[name], value.astype(jnp.bfloat16).astype(jnp.float32))


def test_only_relative_positions_matter():
    params = random_params(SMALL)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, SMALL.vocab_size, (2, 24)), jnp.int32)
    with jax.default_matmul_precision("highest"):
        here, there = (
            hidden_states(params, SMALL, tokens, positions_of(tokens) + offset, plain_attention) for offset in (0, 300)
        )
    np.testing.assert_allclose(here, there, atol=2e-3)


def test_later_tokens_change_nothing_before_them():
    params = random_params(SMALL)
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, SMALL.vocab_size, (1, 24)), jnp.int32)
    changed = tokens.at[0, 12:].set(0)
    np.testing.assert_allclose(
        forward(params, SMALL, tokens)[:, :12], forward(params, SMALL, changed)[:, :12], atol=1e-5
    )
