"""The Triton variants lower for CUDA without a GPU, also inside shard_map on a part of the devices."""

import functools
import inspect
import math
import subprocess
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import triton
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from loongjax.errors import ConfigError
from loongjax.pallas_kernels import (
    decode_attention,
    extend_attention,
    kv_update,
    prefill_attention,
    project,
    triton_gpu,
)
from loongjax.pallas_kernels.decode_attention import api as decode_api
from loongjax.pallas_kernels.decode_attention import triton_variant as decode_variant
from loongjax.pallas_kernels.decode_attention.triton_variant import triton_decode_attention
from loongjax.pallas_kernels.extend_attention import api as extend_api
from loongjax.pallas_kernels.extend_attention import triton_variant as extend_variant
from loongjax.pallas_kernels.extend_attention.triton_variant import triton_extend_attention
from loongjax.pallas_kernels.paged_triton import launch as paged_launch
from loongjax.pallas_kernels.paged_triton.launch import PagedTuning
from loongjax.pallas_kernels.prefill_attention import api as prefill_api
from loongjax.pallas_kernels.prefill_attention import triton_variant as prefill_variant
from loongjax.pallas_kernels.prefill_attention.triton_kernel import prefill_kernel
from loongjax.pallas_kernels.prefill_attention.triton_variant import TritonPrefillTuning
from loongjax.pallas_kernels.triton_call import compile_for, triton_call
from loongjax.pallas_kernels.triton_compile import compile_kernel

Shape = jax.ShapeDtypeStruct
TRITON_CALL = jax.export.DisabledSafetyCheck.custom_call("triton_kernel_call_ffi")


def lower(function, *arguments) -> str:
    """The module that a GPU would be given."""
    exported = jax.export.export(jax.jit(function), platforms=["cuda"], disabled_checks=[TRITON_CALL])(*arguments)
    return exported.mlir_module()


def decode_arguments(num_rows: int, heads: tuple[int, int, int], page_size: int, dtype: str) -> tuple[Shape, ...]:
    num_q_heads, num_kv_heads, head_dim = heads
    rows = Shape((num_rows,), "int32")
    pool = Shape((2, 2, 100, page_size, num_kv_heads, head_dim), dtype)
    return Shape((num_rows, num_q_heads, head_dim), dtype), pool, Shape((), "int32"), Shape((50,), "int32"), rows, rows


def prefill_arguments(shape: tuple[int, int, int, int, int], dtype: str = "bfloat16") -> tuple[Shape, ...]:
    """For the shape (T, S, N, K, H)."""
    T, S, N, K, H = shape
    kv, bounds = Shape((S, K, H), dtype), Shape((T,), "int32")
    return Shape((T, N, H), dtype), kv, kv, bounds, bounds


triton_decode = functools.partial(decode_attention, implementation="triton")
triton_prefill = functools.partial(prefill_attention, implementation="triton")


@pytest.mark.parametrize(
    ("num_rows", "heads", "page_size", "dtype"),
    [(1, (32, 8, 128), 1, "bfloat16"), (5, (8, 8, 64), 16, "float16"), (256, (64, 1, 128), 64, "bfloat16")],
)
def test_decode_attention_is_two_kernels(num_rows, heads, page_size, dtype):
    module = lower(triton_decode, *decode_arguments(num_rows, heads, page_size, dtype))
    assert module.count("custom_call @triton_kernel_call_ffi") == 2


@pytest.mark.parametrize(("num_rows", "heads"), [(1, (32, 8, 128)), (512, (8, 8, 64)), (100, (64, 1, 128))])
def test_extend_attention_is_two_kernels(num_rows, heads):
    _, *arguments = decode_arguments(4, heads, 16, "bfloat16")
    q, cu_q_lens = Shape((num_rows, heads[0], heads[2]), "bfloat16"), Shape((5,), "int32")
    extend = functools.partial(extend_attention, implementation="triton")
    assert lower(extend, q, cu_q_lens, *arguments).count("custom_call @triton_kernel_call_ffi") == 2


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1000, 300, 8, 2, 128), "bfloat16"),
        ((64, 1001, 4, 4, 64), "float16"),
        ((1, 1, 6, 2, 32), "bfloat16"),
        ((65_536, 65_536, 8, 1, 256), "float16"),
    ],
)
@pytest.mark.parametrize("out_dtype", [None, "float32"])
def test_prefill_attention_is_one_kernel(shape, dtype, out_dtype):
    prefill = functools.partial(triton_prefill, out_dtype=out_dtype)
    assert lower(prefill, *prefill_arguments(shape, dtype)).count("custom_call @triton_kernel_call_ffi") == 1
    o, lse = jax.eval_shape(prefill, *prefill_arguments(shape, dtype))
    assert (o.shape, o.dtype) == ((shape[0], shape[2], shape[4]), out_dtype or dtype)
    assert (lse.shape, lse.dtype) == (o.shape[:2], jnp.float32)


@pytest.fixture
def compiled(monkeypatch) -> list:
    """The kernels that are compiled from here on."""
    kernels = []

    def record(*arguments, **settings):
        kernels.append(compile_kernel(*arguments, **settings))
        return kernels[-1]

    monkeypatch.setattr("loongjax.pallas_kernels.triton_call.compile_kernel", record)
    return kernels


def test_kernels_travel_as_bare_instructions_that_ptxas_takes(compiled, tmp_path):
    lower(triton_decode, *decode_arguments(5, (8, 2, 64), 16, "bfloat16"))
    assert list(dict.fromkeys(kernel.name for kernel in compiled)) == ["attend_kernel", "merge_kernel"]
    for kernel in compiled:
        assert f".entry {kernel.name}(" in kernel.ptx
        for debug in (".loc", ".file", ".debug", "//"):
            assert debug not in kernel.ptx
        path = tmp_path / f"{kernel.name}.ptx"
        path.write_text(kernel.ptx)
        ptxas = [
            Path(triton.__file__).parent / "backends/nvidia/bin/ptxas",
            "-arch=sm_90a",
            "-o",
            tmp_path / "kernel.cubin",
            path,
        ]
        subprocess.run(ptxas, check=True)


SHARED_MEMORY_KIB = {89: 99, 90: 227, 100: 227}
"""By compute capability."""


@pytest.mark.parametrize("capability", SHARED_MEMORY_KIB)
@pytest.mark.parametrize("head_dim", prefill_variant.TUNINGS)
def test_prefill_attentions_blocks_fit_shared_memory(monkeypatch, compiled, head_dim, capability):
    monkeypatch.setattr("loongjax.pallas_kernels.triton_call.compute_capability", lambda: capability)
    prefill = functools.partial(
        inspect.unwrap(prefill_variant.triton_prefill_attention), sm_scale=1 / 3, out_dtype=jnp.dtype("bfloat16")
    )
    lower(prefill, *prefill_arguments((256, 256, 2, 1, head_dim)))
    assert len(compiled) == 1
    assert compiled[0].shared_bytes <= SHARED_MEMORY_KIB[capability] * 1024


@pytest.mark.parametrize("capability", SHARED_MEMORY_KIB)
@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
@pytest.mark.parametrize("op", ["decode", "extend"])
def test_the_paged_kernels_blocks_fit_shared_memory(monkeypatch, compiled, op, head_dim, capability):
    monkeypatch.setattr("loongjax.pallas_kernels.triton_call.compute_capability", lambda: capability)
    q, *operands = decode_arguments(4, (4, 1, head_dim), 16, "bfloat16")
    settings = {"sm_scale": 1 / 3, "out_dtype": jnp.dtype("bfloat16")}
    if op == "decode":
        lower(functools.partial(inspect.unwrap(triton_decode_attention), **settings), q, *operands)
    else:
        q, cu_q_lens = Shape((600, 4, head_dim), "bfloat16"), Shape((5,), "int32")
        lower(functools.partial(inspect.unwrap(triton_extend_attention), **settings), q, cu_q_lens, *operands)
    assert {kernel.name for kernel in compiled} == {"attend_kernel", "merge_kernel"}
    assert max(kernel.shared_bytes for kernel in compiled) <= SHARED_MEMORY_KIB[capability] * 1024


@pytest.mark.parametrize("capability", ["8.6", "9.0"])
@pytest.mark.parametrize("heads", [(4, 1, 64), (64, 1, 128), (4, 2, 256)], ids=str)
@pytest.mark.parametrize("op", ["decode", "extend"])
def test_as_many_programs_are_launched_as_run_at_once(monkeypatch, gpu_machine, op, heads, capability):
    gpu_machine.compute_capability, gpu_machine.core_count = capability, 100
    launched = {}

    def record(*operands, name, grid, **settings):
        if name == "paged_attend":
            launched[name] = math.prod(grid), compile_for(*operands, **settings).shared_bytes
        return triton_call(*operands, name=name, grid=grid, **settings)

    monkeypatch.setattr(paged_launch, "triton_call", record)
    q, *operands = decode_arguments(4, heads, 16, "bfloat16")
    settings = {"sm_scale": 1 / 3, "out_dtype": jnp.dtype("bfloat16")}
    if op == "decode":
        wanted = decode_variant.default_tuning(heads[2]).programs_per_processor
        lower(functools.partial(inspect.unwrap(triton_decode_attention), **settings), q, *operands)
    else:
        wanted = extend_variant.default_tuning(heads[2]).programs_per_processor
        q, cu_q_lens = Shape((600, heads[0], heads[2]), "bfloat16"), Shape((5,), "int32")
        lower(functools.partial(inspect.unwrap(triton_extend_attention), **settings), q, cu_q_lens, *operands)
    num_programs, shared_bytes = launched["paged_attend"]
    kib = {"8.6": 100, "9.0": 228}[capability]
    fitting = kib * 1024 // (shared_bytes + 1024)
    assert num_programs == 100 * max(1, min(wanted, fitting))


def test_registers_are_capped_only_where_programs_would_not_fit(compiled):
    lower(triton_decode, *decode_arguments(5, (32, 8, 128), 16, "bfloat16"))
    assert ".maxnreg 168" in compiled[0].ptx, "three programs of 128 threads"
    compiled.clear()
    _, *arguments = decode_arguments(4, (32, 8, 128), 16, "bfloat16")
    q, cu_q_lens = Shape((600, 32, 128), "bfloat16"), Shape((5,), "int32")
    lower(functools.partial(extend_attention, implementation="triton"), q, cu_q_lens, *arguments)
    assert not any(".maxnreg" in kernel.ptx for kernel in compiled)


@pytest.mark.parametrize("check_vma", [False, True])
def test_prefill_attention_lowers_inside_shard_map_on_a_part_of_the_devices(check_vma):
    mesh = Mesh(np.array(jax.devices())[[1, 4, 6]], ("sp",))
    mapped = jax.shard_map(
        triton_prefill,
        mesh=mesh,
        in_specs=(P("sp"), P(), P(), P("sp"), P("sp")),
        out_specs=P("sp"),
        check_vma=check_vma,
    )
    module = lower(mapped, *prefill_arguments((300, 200, 4, 2, 64)))
    assert module.count("custom_call @triton_kernel_call_ffi") == 1


@pytest.mark.parametrize("shape", [(0, 8, 2, 1, 64), (8, 0, 2, 1, 64)])
def test_prefill_attention_without_rows_or_keys_needs_no_kernel(shape):
    assert "triton_kernel_call_ffi" not in lower(triton_prefill, *prefill_arguments(shape))


@pytest.mark.parametrize(("dtype", "head_dim"), [("float32", 128), ("bfloat16", 96)])
def test_prefill_attention_tells_what_it_does_not_take(dtype, head_dim):
    message = f"bfloat16 and float16 with head_dim 32, 64, 128, 256, got {dtype} with {head_dim}; 'blockwise' takes any"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(triton_prefill, *prefill_arguments((8, 8, 2, 1, head_dim), dtype))


def test_prefill_attention_refuses_a_gradient():
    def loss(q, *rest):
        return triton_prefill(q, *rest)[0].astype(jnp.float32).sum()

    with pytest.raises(NotImplementedError, match="'triton' is forward only; 'blockwise' has gradients"):
        jax.eval_shape(jax.grad(loss), *prefill_arguments((8, 8, 2, 1, 64)))


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
    assert module.count("custom_call @triton_kernel_call_ffi") == 3


def test_a_constant_of_a_kernel_may_be_a_number_of_numpys():
    q, *others, out = (Shape((16, 1, 32), "float16"),) * 4
    bounds, lse = Shape((16,), "int32"), Shape((16, 1), "float32")
    sizes = {"num_kv_heads": 1, "group_size": 1, "head_dim": 32, "block_q": 16, "block_k": 16, "stages": 1}

    def call(*arrays):
        settings = {"scale": np.float32(0.3), **sizes}
        return triton_call(
            *arrays, 16, 16, kernel=prefill_kernel, name="prefill", out_shape=[out, lse], grid=(1, 1), **settings
        )

    assert "triton_kernel_call_ffi" in lower(call, q, *others, bounds, bounds)


def test_rows_or_tables_that_are_not_there_need_no_kernel():
    for num_rows, num_entries in ((0, 50), (3, 0)):
        q, pool, layer, _, starts, lens = decode_arguments(num_rows, (4, 2, 64), 16, "bfloat16")
        arguments = (q, pool, layer, Shape((num_entries,), "int32"), starts, lens)
        assert "triton_kernel_call_ffi" not in lower(triton_decode, *arguments)


@pytest.mark.parametrize(("dtype", "head_dim"), [("float32", 64), ("bfloat16", 80)])
def test_what_it_does_not_take_is_told_with_what_does(dtype, head_dim):
    with pytest.raises(ValueError, match="'blockwise' takes any"):
        lower(triton_decode, *decode_arguments(2, (4, 2, head_dim), 16, dtype))


def test_a_gradient_is_refused():
    q = jnp.ones((1, 2, 64), jnp.bfloat16)
    pool = jnp.ones((1, 2, 1, 16, 1, 64), jnp.bfloat16)
    zero, tables = jnp.int32(0), jnp.zeros(1, jnp.int32)
    with pytest.raises(NotImplementedError, match="forward only"):
        jax.grad(lambda q: triton_decode(q, pool, zero, tables, tables, tables)[0].astype(jnp.float32).sum())(q)


def test_packages_that_are_missing_are_named(monkeypatch):
    monkeypatch.setattr(triton_gpu.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"loongjax\[gpu\]"):
        triton_gpu.require_triton("decode_attention")


@pytest.mark.parametrize("block", [8, 48])
def test_a_block_that_cannot_work_is_refused(block):
    with pytest.raises(ConfigError, match="power of two"):
        PagedTuning(block=block)
    for name in ("block_q", "block_k"):
        with pytest.raises(ConfigError, match=f"{name} must be a power of two"):
            TritonPrefillTuning(**{name: block})


@pytest.fixture
def gpu_machine(monkeypatch):
    """As far as choosing variants goes: a GPU, whose `compute_capability` a test may change before it asks."""
    gpu = types.SimpleNamespace(platform="gpu", compute_capability="9.0", core_count=132)
    monkeypatch.setattr(triton_gpu, "_any_gpu", lambda: gpu)
    caches = (
        triton_gpu.is_triton_installed,
        triton_gpu.is_triton_usable,
        decode_api.default_variant,
        extend_api.default_variant,
        prefill_api.default_variant,
    )
    for function in caches:
        function.cache_clear()
    yield gpu
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


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim"),
    [
        ("8.0", "bfloat16", 128),
        ("8.9", "bfloat16", 32),
        ("12.0", "float16", 64),
        ("9.0", "bfloat16", 256),
        ("9.0", "float16", 32),
    ],
)
def test_prefill_attention_takes_this_kernel_where_hoppers_cannot_serve(gpu_machine, capability, dtype, head_dim):
    assert prefill_api.default_variant("gpu", capability, dtype, head_dim) == "triton"


def test_prefill_attention_takes_hoppers_kernel_where_it_can(gpu_machine):
    assert prefill_api.default_variant("gpu", "9.0", "bfloat16", 128) == "mosaic_gpu"


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim"),
    [
        ("9.0", "float32", 128),
        ("8.0", "float32", 64),
        ("8.0", "bfloat16", 96),
    ],
)
def test_prefill_attention_says_once_that_no_kernel_serves(gpu_machine, caplog, capability, dtype, head_dim):
    with caplog.at_level("INFO"):
        for _ in range(2):
            assert prefill_api.default_variant("gpu", capability, dtype, head_dim) == "blockwise"
    message = f"no kernel for {dtype} with head_dim {head_dim}, using the slower 'blockwise'"
    assert caplog.text.count(message) == 1


@pytest.mark.parametrize("capability", ["7.5", "gfx942", ""])
def test_no_op_takes_a_triton_kernel_where_triton_compiles_for_none(gpu_machine, caplog, capability):
    gpu_machine.compute_capability = capability
    assert decode_api.default_variant("bfloat16", 128) == "blockwise"
    assert prefill_api.default_variant("gpu", capability, "bfloat16", 128) == "blockwise"
    for num_rows in (1, 1000):
        sizes = {"page_size": 16, "num_rows": num_rows, "num_requests": 2}
        assert extend_api.default_variant("gpu", capability, "bfloat16", 128, **sizes) == "blockwise"
    x, weight = Shape((1, 64), "bfloat16"), Shape((16, 64), "bfloat16")
    assert "triton_kernel_call_ffi" not in lower(lambda x, weight: project(x, (weight,)), x, weight)
    assert caplog.text.count(f"no Triton kernels for compute capability {capability!r}") == 1


def test_a_gpu_without_the_packages_is_told_what_to_install(gpu_machine, monkeypatch, caplog):
    monkeypatch.setattr(triton_gpu.importlib.util, "find_spec", lambda name: None)
    assert decode_api.default_variant("bfloat16", 128) == "blockwise"
    assert prefill_api.default_variant("gpu", "8.0", "bfloat16", 128) == "blockwise"
    assert "pip install 'loongjax[gpu]'" in caplog.text
