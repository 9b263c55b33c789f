"""The Hopper variant of prefill_attention where there is no GPU: it lowers for CUDA, and says what it cannot do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from benchmarks.prefill_kernel import HEAD_DIM, TUNINGS
from loongjax.errors import ConfigError
from loongjax.pallas_kernels import prefill_attention
from loongjax.pallas_kernels.prefill_attention import api
from loongjax.pallas_kernels.prefill_attention.mosaic_gpu import mosaic_gpu_prefill_attention
from loongjax.pallas_kernels.prefill_attention.mosaic_gpu_tuning import PrefillTuning
from loongjax.pallas_kernels.prefill_attention.visits import plan_visits
from tests.parallel.meshes import AXIS, mesh_of

KERNEL = "mosaic_gpu_v2"
attend = functools.partial(prefill_attention, implementation="mosaic_gpu")


def arguments(shape: tuple[int, int, int, int, int], dtype: str = "bfloat16") -> list[jax.ShapeDtypeStruct]:
    """Of `prefill_attention`, for the shape (T, S, N, K, H)."""
    T, S, N, K, H = shape
    q, kv = jax.ShapeDtypeStruct((T, N, H), dtype), jax.ShapeDtypeStruct((S, K, H), dtype)
    bounds = jax.ShapeDtypeStruct((T,), jnp.int32)
    return [q, kv, kv, bounds, bounds]


def lower_for_cuda(attend, arguments: list[jax.ShapeDtypeStruct]) -> jax.export.Exported:
    allow_kernel = [jax.export.DisabledSafetyCheck.custom_call(KERNEL)]
    return jax.export.export(jax.jit(attend), platforms=["cuda"], disabled_checks=allow_kernel)(*arguments)


@pytest.mark.parametrize("out_dtype", ["float32", None])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_it_lowers_for_every_dtype_and_head_dim(dtype, head_dim, out_dtype):
    exported = lower_for_cuda(
        functools.partial(attend, out_dtype=out_dtype), arguments((256, 512, 4, 2, head_dim), dtype)
    )
    assert KERNEL in exported.mlir_module()
    o, lse = exported.out_avals
    assert (o.shape, o.dtype) == ((256, 4, head_dim), out_dtype or dtype)
    assert (lse.shape, lse.dtype) == ((256, 4), jnp.float32)


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((128, 128, 4, 4, 128), id="MHA"),
        pytest.param((128, 128, 8, 1, 64), id="MQA"),
        pytest.param((1, 1, 2, 1, 128), id="one token"),
        pytest.param((63, 1001, 2, 2, 128), id="odd T and S"),
        pytest.param((129, 7, 4, 2, 64), id="few keys"),
        pytest.param((65_536, 65_536, 32, 8, 128), id="long"),
    ],
)
def test_it_lowers_for_any_shape(shape):
    o, lse = lower_for_cuda(attend, arguments(shape)).out_avals
    T, _, N, _, H = shape
    assert (o.shape, lse.shape) == ((T, N, H), (T, N))


@pytest.mark.parametrize("shape", [(0, 8, 2, 1, 64), (8, 0, 2, 1, 64)])
def test_without_rows_or_keys_there_is_no_kernel(shape):
    assert KERNEL not in lower_for_cuda(attend, arguments(shape)).mlir_module()


@pytest.mark.parametrize(
    ("head_dim", "tuning"),
    [
        (128, PrefillTuning(block_kv=64, num_stages=4)),
        (128, PrefillTuning(num_programs=132)),
        (128, PrefillTuning(num_programs=132, block_q=192, block_kv=64)),
        (64, PrefillTuning(block_q=192)),
        (64, PrefillTuning(block_kv=192)),
    ],
)
def test_it_lowers_for_other_tunings(head_dim, tuning):
    tuned = functools.partial(mosaic_gpu_prefill_attention, sm_scale=0.1, out_dtype=jnp.dtype("float32"), tuning=tuning)
    assert KERNEL in lower_for_cuda(tuned, arguments((100, 300, 2, 1, head_dim))).mlir_module()


@pytest.mark.parametrize("shape", [(256, 256, 2, 1, HEAD_DIM), (100, 8192, 2, 1, HEAD_DIM)])
@pytest.mark.parametrize("tuning", TUNINGS.values(), ids=TUNINGS.keys())
def test_every_tuning_of_the_benchmark_fits_shared_memory(tuning, shape):
    tuned = functools.partial(
        mosaic_gpu_prefill_attention, sm_scale=0.1, out_dtype=jnp.dtype("bfloat16"), tuning=tuning
    )
    assert KERNEL in lower_for_cuda(tuned, arguments(shape)).mlir_module()


@pytest.mark.parametrize("check_vma", [True, False])
def test_it_lowers_inside_shard_map_on_a_sub_mesh(check_vma):
    sharded = jax.shard_map(
        attend,
        mesh=mesh_of(3),
        in_specs=(P(AXIS), P(), P(), P(AXIS), P(AXIS)),
        out_specs=P(AXIS),
        check_vma=check_vma,
    )
    exported = lower_for_cuda(sharded, arguments((300, 512, 4, 2, 128)))
    assert exported.nr_devices == 3
    assert exported.out_avals[0].shape == (300, 4, 128)


@pytest.mark.parametrize("heads_axis", ["tp", None])
def test_it_lowers_with_heads_over_one_axis_and_rows_over_another(heads_axis):
    mesh = Mesh(np.array(jax.devices())[[1, 2, 4, 7]].reshape(2, 2), ("sp", "tp"))
    rows, heads = P("sp"), P("sp", heads_axis)
    sharded = jax.shard_map(
        attend, mesh=mesh, in_specs=(heads, heads, heads, rows, rows), out_specs=heads, check_vma=False
    )
    assert KERNEL in lower_for_cuda(sharded, arguments((256, 256, 4, 2, 128))).mlir_module()


@pytest.mark.parametrize(("dtype", "head_dim"), [("float32", 128), ("bfloat16", 96), ("float16", 256)])
def test_what_it_cannot_do_is_refused_by_name(dtype, head_dim):
    message = f"bfloat16 and float16 with head_dim 64 and 128, got {dtype} with {head_dim}"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(attend, *arguments((8, 8, 2, 1, head_dim), dtype))


def test_a_gradient_is_refused():
    def loss(q, *rest):
        return attend(q, *rest)[0].astype(jnp.float32).sum()

    with pytest.raises(NotImplementedError, match="forward only; 'blockwise' has gradients"):
        jax.eval_shape(jax.grad(loss), *arguments((8, 8, 2, 1, 64)))


@pytest.mark.parametrize("fields", [{"block_q": 64}, {"block_kv": 100}, {"num_stages": 1}, {"num_programs": 0}])
def test_a_tuning_that_cannot_run_is_refused(fields):
    (name,) = fields
    with pytest.raises(ConfigError, match=f"{name} must be"):
        PrefillTuning(**fields)


def test_only_hopper_prefers_its_kernel_and_only_where_there_is_one():
    api.default_variant.cache_clear()
    assert api.default_variant("gpu", "9.0", "bfloat16", 128) == "mosaic_gpu"
    assert api.default_variant("gpu", "9.0", "float16", 64) == "mosaic_gpu"
    for case in [("gpu", "9.0", "float32", 128), ("gpu", "9.0", "bfloat16", 80), ("gpu", "8.0", "bfloat16", 128)]:
        assert api.default_variant(*case) == "blockwise"
    assert api.default_variant("cpu", "", "bfloat16", 128) == "blockwise"
    api.default_variant.cache_clear()


BLOCK_Q, BLOCK_KV, NUM_KEYS, ALIGNMENT = 4, 6, 50, 2


@settings(max_examples=200, deadline=None)
@given(ranges=st.lists(st.tuples(st.integers(0, NUM_KEYS), st.integers(0, NUM_KEYS)), min_size=8, max_size=8))
def test_visited_blocks_cover_every_range_and_bare_ones_lie_in_all(ranges):
    k_start, k_end = np.array(ranges, np.int32).T
    visits = plan_visits(
        jnp.asarray(k_start),
        jnp.asarray(k_end),
        num_keys=NUM_KEYS,
        block_q=BLOCK_Q,
        block_kv=BLOCK_KV,
        alignment=ALIGNMENT,
    )
    for block, (first_key, num_blocks, bare_begin, bare_end) in enumerate(np.stack(visits, axis=1)):
        rows = [range(*ranges[row]) for row in range(block * BLOCK_Q, (block + 1) * BLOCK_Q)]
        seen = [set(row) for row in rows if row]
        needed = set().union(*seen)
        blocks = [
            set(range(begin, begin + BLOCK_KV))
            for begin in range(first_key, first_key + num_blocks * BLOCK_KV, BLOCK_KV)
        ]
        assert needed <= set().union(*blocks)
        assert first_key % ALIGNMENT == 0
        assert 0 <= bare_begin <= bare_end <= num_blocks
        if seen:
            # No block begins or ends wholly outside, and the bare ones are all that every row sees whole.
            assert min(needed) - first_key < ALIGNMENT
            assert max(needed) in blocks[-1]
            bare = [index for index, keys in enumerate(blocks) if all(keys <= row for row in seen)]
            assert bare == list(range(bare_begin, bare_end))
        else:
            assert num_blocks == 1
