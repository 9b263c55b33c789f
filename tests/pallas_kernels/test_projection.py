"""project and project_gated: the reference against float64, how a variant is chosen, and that the kernel lowers."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from loongjax.errors import ConfigError
from loongjax.pallas_kernels import project, project_gated
from loongjax.pallas_kernels.projection import api as projection_api
from loongjax.pallas_kernels.projection.triton_variant import ProjectionTuning, triton_project, triton_project_gated

Shape = jax.ShapeDtypeStruct
TRITON_CALL = jax.export.DisabledSafetyCheck.custom_call("triton_kernel_call_ffi")
CALL = "custom_call @triton_kernel_call_ffi"


def lower(function, *arguments) -> str:
    """The module that a GPU would be given."""
    exported = jax.export.export(jax.jit(function), platforms=["cuda"], disabled_checks=[TRITON_CALL])(*arguments)
    return exported.mlir_module()


def random_matrix(seed: int, rows: int, columns: int, dtype: str) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal((rows, columns)), dtype)


def exact(x: jax.Array, weight: jax.Array) -> np.ndarray:
    return np.asarray(x).astype(np.float64) @ np.asarray(weight).astype(np.float64).T


triton = functools.partial(project, implementation="triton")


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float16", 1e-3), ("bfloat16", 8e-3)])
def test_products_are_float64s(dtype, tolerance):
    x = random_matrix(0, 5, 40, dtype)
    weights = tuple(random_matrix(1 + i, rows, 40, dtype) for i, rows in enumerate((7, 1, 12, 3)))
    for found, weight in zip(project(x, weights), weights, strict=True):
        assert found.dtype == x.dtype
        np.testing.assert_allclose(np.asarray(found, np.float64), exact(x, weight), rtol=tolerance, atol=1e-5)


def test_the_result_may_keep_the_precision_of_the_sum():
    x, weight = random_matrix(0, 3, 1000, "bfloat16"), random_matrix(1, 4, 1000, "bfloat16")
    (found,) = project(x, (weight,), out_dtype=jnp.float32)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, exact(x, weight), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("float16", 2e-3), ("bfloat16", 2e-2)])
def test_the_gated_product_is_float64s_of_rounded_products(dtype, tolerance):
    x, gate, up = (random_matrix(i, rows, 40, dtype) for i, rows in enumerate((5, 9, 9)))
    found = project_gated(x, gate, up)
    assert found.dtype == x.dtype
    a, b = (np.asarray(jnp.asarray(exact(x, weight), dtype)).astype(np.float64) for weight in (gate, up))
    expected = a / (1 + np.exp(-a)) * b
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=tolerance, atol=tolerance)


def test_the_reference_has_gradients():
    x, weight = random_matrix(0, 3, 8, "float32"), random_matrix(1, 4, 8, "float32")
    gradient = jax.grad(lambda x: project(x, (weight,))[0].sum())(x)
    np.testing.assert_allclose(gradient[1], weight.sum(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_tokens", [1, 2, 8, 13, 32])
@pytest.mark.parametrize("out_dims", [(4096,), (4096, 1024, 1024), (100, 7)])
def test_matrices_that_share_their_rows_are_one_launch(num_tokens, out_dims):
    x, weights = Shape((num_tokens, 256), "bfloat16"), tuple(Shape((rows, 256), "bfloat16") for rows in out_dims)
    assert lower(triton, x, weights).count(CALL) == 1
    results = jax.eval_shape(functools.partial(triton, out_dtype=jnp.float32), x, weights)
    assert [(y.shape, y.dtype) for y in results] == [((num_tokens, rows), jnp.float32) for rows in out_dims]


@pytest.mark.parametrize("num_tokens", [1, 2, 32])
def test_the_gated_product_is_one_launch(num_tokens):
    weight = Shape((1376, 512), "float16")
    gated = functools.partial(project_gated, implementation="triton")
    module = lower(gated, Shape((num_tokens, 512), "float16"), weight, weight)
    assert module.count(CALL) == 1
    assert "exponential" not in module


@pytest.mark.parametrize("check_vma", [False, True])
def test_they_lower_inside_shard_map_on_a_part_of_the_devices(check_vma):
    mesh = Mesh(np.array(jax.devices())[[1, 4, 6]], ("tp",))

    def body(x, q, k, gate, up, down):
        q_T, k_T = triton(x, (q, k))
        x = project_gated(x + q_T[:, :1] * k_T[:, :1], gate, up, implementation="triton")
        return jax.lax.psum(triton(x, (down,))[0], "tp")

    column, row = P("tp"), P(None, "tp")
    specs = (P(), column, column, column, column, row)
    mapped = jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=check_vma)
    shapes = (4, 64), (96, 64), (24, 64), (192, 64), (192, 64), (64, 192)
    module = lower(mapped, *(Shape(shape, "bfloat16") for shape in shapes))
    assert module.count(CALL) == 3


@pytest.mark.parametrize(
    ("shape", "dtype", "num_weights"),
    [((1, 64), "float32", 1), ((33, 64), "bfloat16", 1), ((2, 60), "bfloat16", 1), ((2, 64), "float16", 4)],
)
def test_what_the_kernel_does_not_take_is_told_with_what_does(shape, dtype, num_weights):
    weights = (Shape((16, shape[1]), dtype),) * num_weights
    with pytest.raises(ValueError, match="'reference' takes any"):
        jax.eval_shape(triton, Shape(shape, dtype), weights)


def test_operands_that_do_not_fit_are_told():
    x, unchecked = jnp.ones((2, 8)), inspect.unwrap(project)  # without the types that tests check
    for weight in (jnp.ones((3, 9)), jnp.ones((3, 8), jnp.bfloat16), jnp.ones(8)):
        with pytest.raises(ValueError, match=r"must be float32\[out, 8\] as x is, got"):
            unchecked(x, (weight,))
    with pytest.raises(ValueError, match=r"must have one shape, got \(3, 8\) and \(4, 8\)"):
        inspect.unwrap(project_gated)(x, jnp.ones((3, 8)), jnp.ones((4, 8)))


def test_a_gradient_of_the_kernel_is_refused():
    x, weight = jnp.ones((1, 16), jnp.bfloat16), jnp.ones((8, 16), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="forward only"):
        jax.grad(lambda x: triton(x, (weight,))[0].astype(jnp.float32).sum())(x)


@pytest.mark.parametrize("block", [0, 24])
def test_a_block_that_cannot_work_is_refused(block):
    for blocks in ({"block_o": block, "block_i": 64}, {"block_o": 8, "block_i": block}):
        with pytest.raises(ConfigError, match="must be a power of two"):
            ProjectionTuning(num_warps=4, stages=2, **blocks)


@pytest.mark.parametrize(
    ("shape", "dtype", "num_weights", "is_kernel"),
    [
        ((1, 64), "bfloat16", 3, True),
        ((32, 64), "float16", 1, True),
        ((33, 64), "bfloat16", 1, False),
        ((1, 64), "float32", 1, False),
        ((1, 68), "bfloat16", 1, False),
        ((1, 64), "bfloat16", 4, False),
    ],
)
def test_with_a_gpu_the_kernel_serves_what_it_takes(monkeypatch, shape, dtype, num_weights, is_kernel):
    monkeypatch.setattr(projection_api, "is_triton_usable", lambda: True)
    weights = (Shape((16, shape[1]), dtype),) * num_weights
    assert lower(lambda x, weights: project(x, weights), Shape(shape, dtype), weights).count(CALL) == is_kernel


@pytest.mark.parametrize(
    ("num_tokens", "out_dim", "plain", "gated"),
    [(1, 32_000, True, True), (8, 24_000, True, True), (8, 24_008, False, True), (9, 24_000, True, False)],
)
def test_with_a_gpu_the_kernel_serves_where_it_was_the_faster(monkeypatch, num_tokens, out_dim, plain, gated):
    monkeypatch.setattr(projection_api, "is_triton_usable", lambda: True)
    x, weight = Shape((num_tokens, 64), "bfloat16"), Shape((out_dim, 64), "bfloat16")
    assert lower(lambda x, weight: project(x, (weight,)), x, weight).count(CALL) == plain
    assert lower(lambda *operands: project_gated(*operands), x, weight, weight).count(CALL) == gated


def test_without_a_gpu_plain_jax_serves():
    weight = Shape((16, 64), "bfloat16")
    assert CALL not in lower(project_gated, Shape((1, 64), "bfloat16"), weight, weight)


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("num_tokens", [1, 4])
def test_a_tuning_may_deal_rows_out_evenly(num_tokens, stages):
    tuning = ProjectionTuning(
        block_o=2, block_i=64, num_warps=2, stages=stages, programs_per_processor=2, uses_tensor_cores=num_tokens > 1
    )
    x, weight = Shape((num_tokens, 128), "bfloat16"), Shape((1000, 128), "bfloat16")
    plain = functools.partial(triton_project, out_dtype=np.dtype(jnp.float32), tuning=tuning)
    assert lower(plain, x, (weight,)).count(CALL) == 1
    assert lower(functools.partial(triton_project_gated, tuning=tuning), x, weight, weight).count(CALL) == 1
    assert tuning.rows_per_program(1000) == 4
    assert tuning.rows_per_program(100) == 2
