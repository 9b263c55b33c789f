"""Frequencies against transformers (by way of rope.npz), and the rotation against complex numbers."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from loongjax.models.config import ModelConfig
from loongjax.models.rope import LinearRope, Llama3Rope, Rope, YarnRope, apply_rope, rotation
from tests.golden.rope_cases import ROPE_CASES

GOLDEN = Path(__file__).parents[1] / "golden" / "rope.npz"
ULP = 2.0**-23


def rope_of(name: str) -> tuple[Rope, int]:
    config = ModelConfig.from_dict(ROPE_CASES[name] | {"num_hidden_layers": 1, "intermediate_size": 1, "vocab_size": 1})
    return config.rope, config.head_dim


@pytest.mark.parametrize("name", ROPE_CASES)
def test_frequencies_are_those_of_transformers_to_two_units_in_the_last_place(name):
    rope, head_dim = rope_of(name)
    with np.load(GOLDEN) as golden:
        expected = golden[f"{name}_inverse_frequencies"]
        attention_factor = float(golden[f"{name}_attention_factor"])
    found = rope.inverse_frequencies(head_dim)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=2 * ULP, atol=0)
    assert rope.attention_factor == pytest.approx(attention_factor, rel=1e-12)


def test_rotation_multiplies_the_pairs_of_halves_by_complex_units():
    rope = Rope(theta=10000.0)
    positions = np.array([0, 1, 7, 4095, 131071], np.int32)
    x = np.random.default_rng(0).standard_normal((5, 3, 8)).astype(np.float32)
    rotated = np.asarray(apply_rope(jnp.asarray(x), rotation(rope, 8, jnp.asarray(positions))))
    angles = positions.astype(np.float64)[:, None] * rope.inverse_frequencies(8).astype(np.float64)[None]
    angles = angles.astype(np.float32).astype(np.float64)
    expected = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angles)[:, None]
    np.testing.assert_allclose(rotated, np.concatenate([expected.real, expected.imag], axis=-1), atol=1e-5)


def test_angles_at_position_a_million_are_as_good_as_float32_can_hold():
    positions = np.arange(1_000_000 - 64, 1_000_000, dtype=np.int32)
    rope = Rope(theta=50000000.0)
    cos, sin = rotation(rope, 128, jnp.asarray(positions))
    angles = positions.astype(np.float32)[:, None] * rope.inverse_frequencies(128)[None]
    np.testing.assert_allclose(np.asarray(cos), np.cos(angles.astype(np.float64)), atol=1e-6)
    np.testing.assert_allclose(np.asarray(sin), np.sin(angles.astype(np.float64)), atol=1e-6)


def test_scores_depend_on_the_distance_of_positions_only():
    rope = YarnRope(factor=4.0, original_max_position_embeddings=64)
    q, k = np.random.default_rng(1).standard_normal((2, 1, 1, 16)).astype(np.float32)

    def score(q_position: int, k_position: int) -> float:
        rotated = [
            np.asarray(apply_rope(jnp.asarray(x), rotation(rope, 16, jnp.asarray([position], jnp.int32))))
            for x, position in ((q, q_position), (k, k_position))
        ]
        return float((rotated[0] * rotated[1]).sum())

    assert score(100, 90) == pytest.approx(score(10, 0), rel=1e-4)


def test_the_attention_factor_scales_queries_and_keys():
    rope = YarnRope(factor=4.0, original_max_position_embeddings=64, explicit_attention_factor=2.0)
    x = jnp.ones((1, 1, 4))
    np.testing.assert_allclose(np.asarray(apply_rope(x, rotation(rope, 4, jnp.zeros(1, jnp.int32)))), 2.0)


def test_a_rotation_keeps_the_dtype_it_is_given():
    x = jnp.ones((2, 1, 4), jnp.bfloat16)
    assert apply_rope(x, rotation(Rope(), 4, jnp.arange(2))).dtype == jnp.bfloat16


def test_context_lengths_include_the_scaling_where_max_position_embeddings_does_not():
    llama3 = Llama3Rope(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
    assert Rope().context_len(4096) == 4096
    assert LinearRope(factor=4.0).context_len(4096) == 16384
    assert llama3.context_len(131072) == 131072
    assert YarnRope(factor=16.0, original_max_position_embeddings=4096).context_len(65536) == 65536
