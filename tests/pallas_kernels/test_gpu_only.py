"""Variants for GPUs, asked for by name where a program is compiled for something else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from loongjax.pallas_kernels import (
    decode_attention,
    extend_attention,
    kv_update,
    prefill_attention,
    project,
    project_gated,
)
from loongjax.pallas_kernels.gpu_only import gpu_only

ROWS = jnp.ones((8, 2, 64), jnp.bfloat16)
POOL = jnp.ones((1, 2, 4, 16, 2, 64), jnp.bfloat16)
ZERO, INTS = jnp.int32(0), jnp.zeros(8, jnp.int32)
MATRIX = jnp.ones((8, 64), jnp.bfloat16)
CASES = [
    (prefill_attention, (ROWS, ROWS, ROWS, INTS, INTS), "mosaic_gpu"),
    (prefill_attention, (ROWS, ROWS, ROWS, INTS, INTS), "triton"),
    (decode_attention, (ROWS, POOL, ZERO, INTS, INTS, INTS), "triton"),
    (extend_attention, (ROWS, INTS, POOL, ZERO, INTS, INTS[:7], INTS[:7]), "mosaic_gpu"),
    (extend_attention, (ROWS, INTS, POOL, ZERO, INTS, INTS[:7], INTS[:7]), "triton"),
    (extend_attention, (ROWS, INTS, POOL, ZERO, INTS, INTS[:7], INTS[:7]), "by_length"),
    (kv_update, (POOL, ROWS, ROWS, ZERO, INTS), "triton"),
    (project, (MATRIX, (MATRIX,)), "triton"),
    (project_gated, (MATRIX, MATRIX, MATRIX), "triton"),
]
EACH_CASE = pytest.mark.parametrize(
    ("op", "operands", "implementation"), [pytest.param(*case, id=f"{case[0].__name__} {case[2]}") for case in CASES]
)


@EACH_CASE
@pytest.mark.parametrize("is_jitted", [False, True])
def test_a_kernel_for_gpus_is_refused_on_a_cpu_by_name(op, operands, implementation, is_jitted):
    run = functools.partial(op, implementation=implementation)
    message = f"^{op.__name__}: implementation '{implementation}' runs on NVIDIA GPUs, not on 'cpu'"
    with pytest.raises(NotImplementedError, match=message):
        (jax.jit(run) if is_jitted else run)(*operands)


@EACH_CASE
def test_tracing_alone_refuses_nothing(op, operands, implementation):
    jax.eval_shape(functools.partial(op, implementation=implementation), *operands)


triple = gpu_only("triple", "fast", lambda x, factor=3: factor * x)
ARRAY = np.arange(6.0, dtype=np.float32).reshape(2, 3)


def lower_for_cuda(function) -> str:
    return jax.export.export(jax.jit(function), platforms=["cuda"])(ARRAY).mlir_module()


def test_it_leaves_nothing_in_a_program_for_a_gpu():
    with_it, without = (
        jax.jit(function).trace(ARRAY).lower(lowering_platforms=("cuda",)).as_text().splitlines()[1:]
        for function in (triple, lambda operand: 3 * operand)
    )
    assert len(with_it) > 3
    assert with_it == without


def test_a_program_for_both_is_refused():
    with pytest.raises(NotImplementedError, match="triple: implementation 'fast' runs on NVIDIA GPUs, not on 'cpu"):
        jax.export.export(jax.jit(triple), platforms=["cpu", "cuda"])(ARRAY)


def test_it_may_be_mapped_and_differentiated_for_a_gpu():
    lower_for_cuda(jax.vmap(triple))
    assert "stablehlo" in lower_for_cuda(jax.grad(lambda x: triple(x).sum()))
    np.testing.assert_array_equal(jax.grad(lambda x: triple(x).sum())(ARRAY), np.full((2, 3), 3.0))


@pytest.mark.parametrize("check_vma", [False, True])
def test_arrays_vary_behind_it_as_before(check_vma):
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    mapped = jax.shard_map(triple, mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=check_vma)
    exported = jax.export.export(jax.jit(mapped), platforms=["cuda"])(ARRAY)
    assert exported.out_avals[0].shape == (2, 3)
    for run in (mapped, jax.jit(mapped)):
        with pytest.raises(NotImplementedError, match="not on 'cpu'"):
            run(jnp.asarray(ARRAY))
