"""The projection kernel against float64."""

import numpy as np
import pytest

from loongjax.pallas_kernels.projection.kernel import project_kernel
from tests.pallas_kernels.triton_interpreter import interpret


def random_matrix(seed: int, rows: int, columns: int, dtype: str = "float16") -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(dtype)


def run(x, weights, *, is_gated: bool = False, rows_per_program: int = 8, block_o: int = 8, block_i: int = 32):
    """What the launch does. Everything that no program writes is NaN."""
    num_tokens, in_dim = x.shape
    out_dims = [len(weights[0])] if is_gated else [len(weight) for weight in weights]
    rows = out_dims + [0] * (3 - len(out_dims))
    results = [np.full((num_tokens, out_dim), np.nan, np.float32) for out_dim in rows]
    uses_tensor_cores = num_tokens > 1
    interpret(
        project_kernel,
        (sum(-(-out_dim // rows_per_program) for out_dim in out_dims),),
        *(x, *weights, *[weights[0]] * (3 - len(weights)), *results),
        **dict(zip(("a_rows", "b_rows", "c_rows"), rows, strict=True)),
        num_tokens=num_tokens,
        in_dim=in_dim,
        is_gated=is_gated,
        uses_tensor_cores=uses_tensor_cores,
        padded_tokens=max(8, 1 << (num_tokens - 1).bit_length()) if uses_tensor_cores else 1,
        rows_per_program=rows_per_program,
        block_o=block_o,
        block_i=block_i,
        stages=2,
    )
    return results[: len(out_dims)]


def exact(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x.astype(np.float64) @ weight.astype(np.float64).T


def check(x, weights, **options) -> None:
    for found, weight in zip(run(x, weights, **options), weights, strict=True):
        np.testing.assert_allclose(found, exact(x, weight), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 8, 9, 17, 32])
@pytest.mark.parametrize("out_dim", [1, 7, 8, 20])
def test_products_are_float64s(num_tokens, out_dim):
    check(random_matrix(0, num_tokens, 64), (random_matrix(1, out_dim, 64),))


@pytest.mark.parametrize("num_tokens", [1, 5])
@pytest.mark.parametrize("in_dim", [8, 32, 40, 104])
def test_rows_of_any_length(num_tokens, in_dim):
    check(random_matrix(2, num_tokens, in_dim), (random_matrix(3, 9, in_dim),))


@pytest.mark.parametrize("num_tokens", [1, 4])
@pytest.mark.parametrize("out_dims", [(5, 8), (8, 8, 8), (17, 3, 1), (1, 24, 9)])
def test_matrices_of_different_heights_share_a_launch(num_tokens, out_dims):
    check(random_matrix(4, num_tokens, 48), tuple(random_matrix(5 + i, n, 48) for i, n in enumerate(out_dims)))


@pytest.mark.parametrize("num_tokens", [1, 4])
@pytest.mark.parametrize("rows_per_program", [1, 3, 11, 21, 100])
def test_a_programs_rows_need_be_no_multiple_of_its_blocks(num_tokens, rows_per_program):
    weights = random_matrix(6, 50, 48), random_matrix(7, 13, 48)
    check(random_matrix(8, num_tokens, 48), weights, rows_per_program=rows_per_program, block_o=4)


@pytest.mark.parametrize("num_tokens", [1, 2, 9])
def test_the_gated_product_is_float64s_of_rounded_products(num_tokens):
    x, gate, up = (random_matrix(9 + i, rows, 40) for i, rows in enumerate((num_tokens, 13, 13)))
    (found,) = run(x, (gate, up), is_gated=True)
    a, b = (exact(x, weight).astype(np.float16).astype(np.float64) for weight in (gate, up))
    # A sum that lies between two numbers of float16 may be rounded to either.
    np.testing.assert_allclose(found, a / (1 + np.exp(-a)) * b, rtol=2e-3, atol=1e-3)


# The sigmoid's denominator is infinite, as it should be.
@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
def test_a_gate_far_below_zero_is_closed():
    x = np.ones((1, 8), np.float16)
    (found,) = run(x, (np.full((2, 8), -100, np.float16), np.ones((2, 8), np.float16)), is_gated=True)
    np.testing.assert_array_equal(found, 0)
