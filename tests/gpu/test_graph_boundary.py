"""On a real GPU, values pass the end of a CUDA graph as they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loongjax.pallas_kernels.graph_boundary import end_graph

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("shape", [(1,), (3, 5, 7), (64, 32, 128)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_values_pass_it_and_those_before_stay_as_they_were(shape, dtype):
    """Often enough for graphs to be made and updated, among kernels that are recorded."""
    x = jax.random.randint(jax.random.key(0), shape, -1, 2).astype(dtype)  # sums of which are exact

    @jax.jit
    def chain(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        before = jnp.cumsum(x * 2, axis=0)
        after = end_graph(before)
        for _ in range(4):
            after = jnp.sort(end_graph(jnp.flip(after, axis=0)), axis=-1)
        return before, after

    expected_before = np.cumsum(2 * np.asarray(x, np.float32), axis=0)
    for _ in range(5):
        before, after = chain(x)
        np.testing.assert_array_equal(np.asarray(before, np.float32), expected_before)
        expected = expected_before
        for _ in range(4):
            expected = np.sort(np.flip(expected, axis=0), axis=-1)
        np.testing.assert_array_equal(np.asarray(after, np.float32), expected)
