"""The Triton variants lower for CUDA without a GPU, also inside shard_map on a part of the devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from loongjax.errors import ConfigError
from loongjax.pallas_kernels import decode_attention, extend_attention, kv_update, triton_gpu
from loongjax.pallas_kernels.decode_attention import api as decode_api
from loongjax.pallas_kernels.paged_triton.launch import PagedTuning

Shape = jax.ShapeDtypeStruct
TRITON_CALL = jax.export.DisabledSafetyCheck.custom_call("triton_kernel_call")


def lower(function, *arguments) -> str:
    """The module that a GPU would be given."""
    exported = jax.export.export(jax.jit(function), platforms=["cuda"], disabled_checks=[TRITON_CALL])(*arguments)
    return exported.mlir_module()


def decode_arguments(num_rows: int, heads: tuple[int, int, int], page_size: int, dtype: str) -> tuple[Shape, ...]:
    num_q_heads, num_kv_heads, head_dim = heads
    rows = Shape((num_rows,), "int32")
    pool = Shape((2, 2, 100, page_size, num_kv_heads, head_dim), dtype)
    return Shape((num_rows, num_q_heads, head_dim), dtype), pool, Shape((), "int32"), Shape((50,), "int32"), rows, rows


triton_decode = functools.partial(decode_attention, implementation="triton")


@pytest.mark.parametrize(
    ("num_rows", "heads", "page_size", "dtype"),
    [(1, (32, 8, 128), 1, "bfloat16"), (5, (8, 8, 64), 16, "float16"), (256, (64, 1, 128), 64, "bfloat16")],
)
def test_decode_attention_is_two_kernels(num_rows, heads, page_size, dtype):
    module = lower(triton_decode, *decode_arguments(num_rows, heads, page_size, dtype))
    assert module.count("custom_call @triton_kernel_call") == 2


@pytest.mark.parametrize(("num_rows", "heads"), [(1, (32, 8, 128)), (512, (8, 8, 64)), (100, (64, 1, 128))])
def test_extend_attention_is_two_kernels(num_rows, heads):
    _, *arguments = decode_arguments(4, heads, 16, "bfloat16")
    q, cu_q_lens = Shape((num_rows, heads[0], heads[2]), "bfloat16"), Shape((5,), "int32")
    extend = functools.partial(extend_attention, implementation="triton")
    assert lower(extend, q, cu_q_lens, *arguments).count("custom_call @triton_kernel_call") == 2


@pytest.mark.parametrize("check_vma", [False, True])
def test_they_lower_inside_shard_map_on_a_part_of_the_devices(check_vma):
    mesh = Mesh(np.array(jax.devices())[[1, 4, 6]], ("sp",))

    def body(q, pool, k, layer, *tables):
        pool = kv_update(pool, k, k, layer, tables[-1], implementation="triton")
        return decode_attention(q, pool, layer, *tables, implementation="triton")[0]

    q, pool, layer, indices, starts, lens = decode_arguments(6, (8, 2, 64), 16, "bfloat16")
    specs = (P("sp"), P(None, None, "sp"), P("sp"), P(), P("sp"), P("sp"), P("sp"))
    mapped = jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=P("sp"), check_vma=check_vma)
    pool, indices = Shape((2, 2, 99, *pool.shape[3:]), pool.dtype), Shape((51,), "int32")
    module = lower(mapped, q, pool, Shape((6, 2, 64), "bfloat16"), layer, indices, starts, lens)
    assert module.count("custom_call @triton_kernel_call") == 3


def test_rows_or_tables_that_are_not_there_need_no_kernel():
    for num_rows, num_entries in ((0, 50), (3, 0)):
        q, pool, layer, _, starts, lens = decode_arguments(num_rows, (4, 2, 64), 16, "bfloat16")
        arguments = (q, pool, layer, Shape((num_entries,), "int32"), starts, lens)
        assert "triton_kernel_call" not in lower(triton_decode, *arguments)


@pytest.mark.parametrize(("dtype", "head_dim"), [("float32", 64), ("bfloat16", 80)])
def test_what_it_does_not_take_is_told_with_what_does(dtype, head_dim):
    with pytest.raises(ValueError, match="'blockwise' takes any"):
        lower(triton_decode, *decode_arguments(2, (4, 2, head_dim), 16, dtype))


def test_a_gradient_is_refused():
    q = jnp.ones((1, 2, 64), jnp.bfloat16)
    pool = jnp.ones((1, 2, 1, 16, 1, 64), jnp.bfloat16)
    zero, tables = jnp.int32(0), jnp.zeros(1, jnp.int32)
    with pytest.raises(NotImplementedError, match="automatic differentiation"):
        jax.grad(lambda q: triton_decode(q, pool, zero, tables, tables, tables)[0].astype(jnp.float32).sum())(q)


def test_packages_that_are_missing_are_named(monkeypatch):
    monkeypatch.setattr(triton_gpu.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"loongjax\[gpu\]"):
        triton_gpu.require_triton("decode_attention")


@pytest.mark.parametrize("block", [8, 48])
def test_a_block_that_cannot_work_is_refused(block):
    with pytest.raises(ConfigError, match="power of two"):
        PagedTuning(block=block)


@pytest.fixture
def gpu_machine(monkeypatch):
    """As far as choosing variants goes."""
    monkeypatch.setattr(triton_gpu, "_any_gpu", lambda: jax.devices()[0])
    caches = (triton_gpu.is_triton_usable, decode_api.default_variant)
    for function in caches:
        function.cache_clear()
    yield
    monkeypatch.undo()
    for function in caches:
        function.cache_clear()


def test_without_a_gpu_plain_jax_is_best():
    assert not triton_gpu.is_triton_usable()
    assert decode_api.default_variant("bfloat16", 128) == "blockwise"


@pytest.mark.parametrize(
    ("dtype", "head_dim", "best"),
    [
        ("bfloat16", 128, "triton"),
        ("float16", 64, "triton"),
        ("float32", 128, "blockwise"),
        ("bfloat16", 24, "blockwise"),
    ],
)
def test_with_a_gpu_the_kernel_serves_what_it_takes(gpu_machine, dtype, head_dim, best):
    assert decode_api.default_variant(dtype, head_dim) == best


def test_a_gpu_without_the_packages_is_told_what_to_install(gpu_machine, monkeypatch, caplog):
    monkeypatch.setattr(triton_gpu.importlib.util, "find_spec", lambda name: None)
    assert decode_api.default_variant("bfloat16", 128) == "blockwise"
    assert "pip install 'loongjax[gpu]'" in caplog.text
