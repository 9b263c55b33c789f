"""The noise of a token is a function of its seed, position and id alone."""

import jax
import jax.numpy as jnp
import numpy as np

from loongjax.runtime.sampling.noise import gumbel_noise
from tests.runtime.sampling.oracle import gumbel

noise_jit = jax.jit(gumbel_noise, static_argnames="vocab_size")

SEEDS = (0, 7, 2**40 + 3, -1, -(2**63), 2**63 - 1)
POSITIONS = (0, 1, 5, 1000, 2**20, 2**31 - 1)


def words(seeds) -> jax.Array:
    return jnp.array([[(seed >> 32) & 0xFFFFFFFF, seed & 0xFFFFFFFF] for seed in seeds], jnp.uint32)


def noise(seeds, positions, vocab_size) -> np.ndarray:
    return np.asarray(noise_jit(words(seeds), jnp.array(positions, jnp.int32), vocab_size))


def test_noise_is_the_documented_threefry_stream():
    actual = noise(SEEDS, POSITIONS, 33)
    expected = np.stack([gumbel(seed, position, 33) for seed, position in zip(SEEDS, POSITIONS, strict=True)])
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_noise_does_not_depend_on_the_padded_vocabulary():
    widest = noise(SEEDS, POSITIONS, 257)
    for vocab_size in (1, 31, 256):
        np.testing.assert_array_equal(noise(SEEDS, POSITIONS, vocab_size), widest[:, :vocab_size])


def test_noise_does_not_depend_on_the_other_rows():
    together = noise(SEEDS, POSITIONS, 64)
    np.testing.assert_array_equal(noise(SEEDS[::-1], POSITIONS[::-1], 64), together[::-1])
    np.testing.assert_array_equal(noise([SEEDS[2]] * 6, [POSITIONS[2]] * 6, 64), together[[2] * 6])
    np.testing.assert_array_equal(noise([SEEDS[4]], [POSITIONS[4]], 64)[0], together[4])


def test_noise_differs_between_seeds_positions_and_ids():
    seeds, positions = np.meshgrid([0, 1, 2**32, -1], [0, 1, 2, 3])
    values = noise(seeds.ravel().tolist(), positions.ravel().tolist(), 64)
    assert len(np.unique(values)) > 0.999 * values.size


def test_noise_has_the_moments_of_a_standard_gumbel_distribution():
    values = noise(range(64), [3] * 64, 4096).astype(np.float64)
    assert np.isfinite(values).all()
    # 2^18 samples: the standard error of the mean is 0.0025, of the variance 0.0067.
    assert abs(values.mean() - np.euler_gamma) < 0.01
    assert abs(values.var() - np.pi**2 / 6) < 0.03
