"""The projection kernel on a GPU against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loongjax.pallas_kernels import project, project_gated

pytestmark = pytest.mark.gpu

OUT_DIMS = [(4096, 1024, 1024), (1, 130, 2051), (4096,)]
TOLERANCE = {"bfloat16": 8e-3, "float16": 1e-3, "float32": 1e-3}
"""By the dtype of the result, which is of order 1; a tenth of it where it is near 0."""


def random_operands(num_tokens: int, in_dim: int, out_dims: tuple[int, ...], dtype: str):
    keys = jax.random.split(jax.random.key(num_tokens + in_dim), len(out_dims) + 1)
    x = jax.random.normal(keys[0], (num_tokens, in_dim), dtype)
    scale = jnp.asarray(in_dim**-0.5, dtype)
    weights = tuple(
        jax.random.normal(key, (rows, in_dim), dtype) * scale for key, rows in zip(keys[1:], out_dims, strict=True)
    )
    return x, weights


def exact(x: jax.Array, weight: jax.Array) -> np.ndarray:
    return np.asarray(x).astype(np.float64) @ np.asarray(weight).astype(np.float64).T


@pytest.mark.parametrize("out_dtype", [None, "float32"])
@pytest.mark.parametrize("num_tokens", [1, 2, 8, 31, 32])
@pytest.mark.parametrize(("in_dim", "dtype"), [(4096, "bfloat16"), (1000, "float16"), (8, "bfloat16")])
def test_products_are_float64s_and_the_same_twice(in_dim, dtype, num_tokens, out_dtype):
    tolerance = TOLERANCE[out_dtype or dtype]
    for out_dims in OUT_DIMS:
        x, weights = random_operands(num_tokens, in_dim, out_dims, dtype)
        run = jax.jit(functools.partial(project, out_dtype=out_dtype, implementation="triton"))
        found, again = run(x, weights), run(x, weights)
        for weight, first, second in zip(weights, found, again, strict=True):
            expected = exact(x, weight)
            np.testing.assert_allclose(np.asarray(first, np.float64), expected, rtol=tolerance, atol=tolerance / 10)
            np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("num_tokens", [1, 8, 31])
@pytest.mark.parametrize("ffn_dim", [11008, 130])
def test_the_gated_product_is_the_references_and_the_same_twice(num_tokens, ffn_dim, dtype):
    x, (gate, up) = random_operands(num_tokens, 4096, (ffn_dim, ffn_dim), dtype)
    run = jax.jit(functools.partial(project_gated, implementation="triton"))
    found, again = run(x, gate, up), run(x, gate, up)
    a, b = exact(x, gate), exact(x, up)
    expected = a / (1 + np.exp(-a)) * b
    # Two rounded factors and a rounded product.
    tolerance = 3 * TOLERANCE[dtype]
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=tolerance, atol=tolerance / 10)
    np.testing.assert_array_equal(found, again)


def test_the_matrices_of_a_model_are_read_by_the_kernel_unless_it_says_otherwise():
    x, (gate, up) = random_operands(1, 4096, (11008, 11008), "bfloat16")
    assert "triton_kernel_call_ffi" in jax.jit(project_gated).lower(x, gate, up).as_text()
    assert "triton_kernel_call_ffi" not in jax.jit(project_gated).lower(jnp.tile(x, (64, 1)), gate, up).as_text()
