"""Initial weights in which lookups are already sketched, so that minutes of training are enough.

Finding a key takes two layers that are of no use without each other: one that carries the name forward, to the key's
first digit as to the end of the question, and one that compares what was carried. From random weights neither is
learned for very long. So both begin roughly right, and training does the rest:

- The embedding leaves some dimensions free, and one is the same for all tokens. From that one, each head of the first
  layer makes queries and keys that agree most, after RoPE, at one distance back; it brings a few numbers about the
  token there into free dimensions of its own.
- Heads of the second layer match what was brought from one distance with what was brought from another, and copy the
  token that they find.

Everything else that writes to the residual stream begins at zero.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from needle.model import ModelConfig, Params, param_shapes, rope_frequencies

EMBEDDING_STD = 0.05
CONSTANT_DIM = 0
LOCAL_FREQUENCY = 0.02
"""Radians a token: pairs of dimensions that turn faster tell neighbouring positions apart."""
LASTING_FREQUENCY = 1e-4
"""Pairs that turn slower stay nearly as they are over thousands of tokens, so that contents can be compared."""
DISTANCES = (1, 3, 4, 5)
"""What the heads of the first layer bring: the token before, and names. A name is 3 and 4 tokens before the first two
digits of its key, and 4 and 5 before the tokens that these must follow in the answer."""
MATCHES = ((0, 1), (4, 3), (5, 4))
"""For heads of the second layer: distance at the query, distance at the key; 0 is the token itself."""
SCORE = 12.0
"""Of a perfect match, before the softmax."""
POSITIONAL_SCORE = 16.0
"""That each local pair adds at the distance looked for."""


def init_params(config: ModelConfig, seed: int) -> Params:
    """Float32 weights for `train_step`. Needs at least 2 layers and 4 heads, as many KV heads as query heads."""
    assert config.num_layers >= 2
    assert config.num_q_heads == config.num_kv_heads >= len(DISTANCES)
    rng = np.random.default_rng(seed)
    params = {name: _random(rng, name, shape) for name, shape in param_shapes(config).items()}
    frequencies = rope_frequencies(config)
    half = config.head_dim // 2
    [lasting_pairs] = np.nonzero(frequencies < LASTING_FREQUENCY)
    lasting = np.concatenate([lasting_pairs, lasting_pairs + half])
    num_brought = len(lasting)
    first_free = config.hidden_size - num_brought * len(DISTANCES)
    content = np.arange(1, first_free)
    slots = {distance: first_free + num_brought * i + np.arange(num_brought) for i, distance in enumerate(DISTANCES)}

    embedding = params["model.embed_tokens.weight"]
    size = EMBEDDING_STD * len(content) ** 0.5
    embedding[:, CONSTANT_DIM] = size
    embedding[:, first_free:] = 0.0
    digest = _orthonormal(rng, num_brought, len(content))

    # After the first norm, content and constant each have half of the squared length; after the second, one part in
    # 2 + len(DISTANCES), since every head brings something as long as the embedding's content.
    unit = (config.hidden_size / 2) ** 0.5
    brought = unit * (num_brought / len(content)) ** 0.5
    q, k, v, o = _projections(params, 0)
    o[:] = 0.0
    local = np.where(frequencies > LOCAL_FREQUENCY, (POSITIONAL_SCORE * config.head_dim**0.5) ** 0.5, 0.0) / unit
    for head, distance in enumerate(DISTANCES):
        rows = head * config.head_dim + np.arange(config.head_dim)
        angles = frequencies * distance
        q[rows, CONSTANT_DIM] = np.concatenate([local * np.cos(angles), -local * np.sin(angles)])
        k[rows, CONSTANT_DIM] = np.concatenate([local, np.zeros_like(local)])
        v[rows] = 0.0
        v[np.ix_(rows[:num_brought], content)] = digest
        o[slots[distance], rows[:num_brought]] = size / brought

    unit = (config.hidden_size / (2 + len(DISTANCES))) ** 0.5
    length = (SCORE * config.head_dim**0.5) ** 0.5
    q, k, v, o = _projections(params, 1)
    o[:] = 0.0
    for head, (query_distance, key_distance) in enumerate(MATCHES):
        rows = head * config.head_dim + np.arange(config.head_dim)
        q[rows], k[rows], v[rows] = 0.0, 0.0, 0.0
        if query_distance == 0:
            q[np.ix_(rows[lasting], content)] = digest * length / (unit * (num_brought / len(content)) ** 0.5)
        else:
            q[rows[lasting], slots[query_distance]] = length / unit
        k[rows[lasting], slots[key_distance]] = length / unit
        copy = _orthonormal(rng, config.head_dim, len(content))
        v[np.ix_(rows, content)] = copy
        o[np.ix_(content, rows)] = copy.T * (2.0 * size / unit)
    return {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}


def _random(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if len(shape) == 1:
        return np.ones(shape)
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        return np.zeros(shape)
    return rng.normal(0.0, EMBEDDING_STD if "embed" in name else shape[1] ** -0.5, shape)


def _projections(params: dict[str, np.ndarray], layer: int) -> list[np.ndarray]:
    return [params[f"model.layers.{layer}.self_attn.{name}_proj.weight"] for name in "qkvo"]


def _orthonormal(rng: np.random.Generator, num_rows: int, num_columns: int) -> np.ndarray:
    """Random rows of length 1, at right angles as far as there is room for it."""
    if num_rows > num_columns:
        return rng.normal(0.0, num_columns**-0.5, (num_rows, num_columns))
    return np.linalg.qr(rng.normal(size=(num_columns, num_rows)))[0].T
