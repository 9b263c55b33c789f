"""Extend attention's Hopper variant on the CPU: interpreted against float64 over poisoned pools, and lowered."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from loongjax.errors import ConfigError
from loongjax.pallas_kernels import extend_attention, triton_gpu
from loongjax.pallas_kernels.extend_attention import api, by_length
from loongjax.pallas_kernels.extend_attention.mosaic_gpu import mosaic_gpu_extend_attention, row_ranges
from loongjax.pallas_kernels.extend_attention.reference import reference_extend_attention
from loongjax.pallas_kernels.prefill_attention.mosaic_gpu_tuning import PrefillTuning
from tests.pallas_kernels.brute_force import attend_requests
from tests.pallas_kernels.mosaic_interpreter import interpreted
from tests.pallas_kernels.paged_case import make_case, random_queries
from tests.pallas_kernels.tolerance import assert_matches

H = 64
KERNEL_CALLS = [jax.export.DisabledSafetyCheck.custom_call(x) for x in ("mosaic_gpu_v2", "triton_kernel_call_ffi")]
Shape = jax.ShapeDtypeStruct
extend = functools.partial(extend_attention, implementation="mosaic_gpu")


def check(q_lens: list[int], kv_lens: list[int], page_size: int, heads: tuple[int, int] = (2, 1), **tuning) -> None:
    """The variant gives what loops in float64 give; what no table names is NaN, and so is junk in tables' slack."""
    num_q_heads, num_kv_heads = heads
    case = make_case(0, kv_lens, page_size=page_size, heads=(num_kv_heads, H), dtype="bfloat16")
    q = random_queries(0, sum(q_lens) + 5, num_q_heads, H, "bfloat16")
    truth = attend_requests(np.asarray(q), q_lens, case.keys, case.values)
    cu_q_lens = jnp.asarray(np.cumsum([0, *q_lens]), jnp.int32)
    settings = {"tuning": PrefillTuning(**tuning), "sm_scale": H**-0.5, "out_dtype": jnp.dtype("float32")}
    with interpreted():
        found = mosaic_gpu_extend_attention(q, cu_q_lens, *case.arguments, **settings)
    assert_matches(found, truth, "bfloat16")


@pytest.mark.parametrize("page_size", [8, 16, 64, 128, 256])
def test_every_page_size(page_size):
    check([70], [300], page_size)


@pytest.mark.parametrize("tuning", [{"num_programs": 2}, {"block_kv": 64, "num_stages": 4}], ids=str)
def test_other_tunings(tuning):
    check([130], [330], 16, **tuning)


@pytest.mark.parametrize("page_size", [1, 4, 12])
def test_pages_too_small_to_fetch_are_brought_into_order_before(page_size, monkeypatch):
    # By their modules: the package's name leads to the op.
    module = importlib.import_module("loongjax.pallas_kernels.extend_attention.gather_pages")
    monkeypatch.setattr(module, "gather_pages", gather_with_numpy)
    check([70, 3, 40], [300, 0, 41], page_size)
    check([1], [5], page_size)


@pytest.fixture
def with_triton(monkeypatch) -> None:
    """As on a GPU with the packages that Triton needs."""
    module = importlib.import_module("loongjax.pallas_kernels.extend_attention.mosaic_gpu")
    monkeypatch.setattr(module, "is_triton_usable", lambda: True)


def test_small_pages_are_brought_into_order_before_many_queries(monkeypatch, with_triton):
    module = importlib.import_module("loongjax.pallas_kernels.extend_attention.gather_pages")
    monkeypatch.setattr(module, "gather_pages", gather_with_numpy)
    module = importlib.import_module("loongjax.pallas_kernels.extend_attention.mosaic_gpu")
    monkeypatch.setattr(module, "MANY_ROWS", 128)
    check([50, 12], [33, 150], 16)


def gather_with_numpy(kv_pool, layer, page_indices, num_used, *, num_rows: int) -> tuple[jax.Array, ...]:
    """What `gather_pages` is to do. Rows that nobody uses are NaN."""
    _, _, num_pages, page_size, *heads = kv_pool.shape
    slots = (jnp.clip(page_indices, 0, num_pages - 1)[:, None] * page_size + jnp.arange(page_size)[None, :]).reshape(-1)
    is_used = (jnp.arange(len(slots)) < num_used)[:, None, None]
    found = (jnp.where(is_used, pool.reshape(-1, *heads)[slots], jnp.nan) for pool in kv_pool[layer])
    missing = ((0, num_rows - len(slots)), (0, 0), (0, 0))
    return tuple(jnp.pad(x, missing, constant_values=jnp.nan) for x in found)


def test_requests_of_any_length_share_blocks_of_rows():
    check([70, 1, 0, 29, 100], [300, 17, 40, 0, 425], 16)
    check([3] * 9, [37 * i % 300 for i in range(9)], 8, heads=(4, 2))


@pytest.mark.parametrize("heads", [(4, 2), (6, 2)], ids=["blocks of one request", "heads of a row in two blocks"])
def test_heads_of_several_requests_with_long_pasts_share_blocks(heads):
    check([64, 0, 64, 33], [2100, 900, 1300, 20], 16, heads=heads)


def test_lengths_at_the_edges_of_pages_and_blocks():
    check([5] * 8, [1, 15, 16, 17, 127, 128, 129, 256], 16)


def test_values_that_nobody_named_are_dropped_when_one_program_takes_all_blocks():
    check([40, 100], [100, 170], 16, num_programs=1)


def test_a_request_without_keys_may_have_any_table():
    cu_q_lens, starts, lens = (jnp.asarray(x, jnp.int32) for x in ([0, 2, 5], [2**31 - 1, 3], [0, 20]))
    k_start, k_end = row_ranges(cu_q_lens, starts, lens, num_rows=7, page_size=16)
    np.testing.assert_array_equal(k_end - k_start, [0, 0, 20, 20, 20, 0, 0])
    np.testing.assert_array_equal(k_start[2:5], 48)


def arguments(num_rows: int, num_requests: int, page_size: int, dtype: str = "bfloat16", head_dim: int = 128):
    int32 = functools.partial(Shape, dtype="int32")
    pool = Shape((2, 2, 40, page_size, 8, head_dim), dtype)
    tables = int32(()), int32((50,)), int32((num_requests,)), int32((num_requests,))
    return Shape((num_rows, 32, head_dim), dtype), int32((num_requests + 1,)), pool, *tables


def lower(function, *operands) -> str:
    exported = jax.export.export(jax.jit(function), platforms=["cuda"], disabled_checks=KERNEL_CALLS)(*operands)
    return exported.mlir_module()


@pytest.mark.parametrize(("num_rows", "page_size"), [(1, 16), (1535, 8), (1535, 16), (2048, 32), (2048, 64)])
def test_it_lowers_to_one_kernel(num_rows, page_size, with_triton):
    module = lower(extend, *arguments(num_rows, 3, page_size))
    assert (module.count("@mosaic_gpu_v2"), module.count("@triton_kernel_call_ffi")) == (1, 0)


@pytest.mark.parametrize(("num_rows", "page_size"), [(1, 1), (512, 2), (100, 12), (1536, 8), (2048, 16)])
def test_with_small_pages_it_lowers_to_a_gather_and_the_kernel(num_rows, page_size, with_triton):
    module = lower(extend, *arguments(num_rows, 3, page_size))
    assert (module.count("@mosaic_gpu_v2"), module.count("@triton_kernel_call_ffi")) == (1, 1)


@pytest.mark.parametrize(("num_kv_heads", "num_gathers"), [(8, 1), (32, 0)])
def test_pages_are_brought_into_order_for_as_many_rows_as_share_a_kv_head(num_kv_heads, num_gathers, with_triton):
    q, cu_q_lens, pool, *tables = arguments(512, 1, 16)
    pool = Shape((*pool.shape[:4], num_kv_heads, pool.shape[5]), pool.dtype)
    assert lower(extend, q, cu_q_lens, pool, *tables).count("@triton_kernel_call_ffi") == num_gathers


def test_small_pages_want_the_packages_that_triton_needs(monkeypatch):
    monkeypatch.setattr(triton_gpu, "_missing_packages", lambda: ["jax_triton"])
    with pytest.raises(
        ConfigError, match="implementation 'mosaic_gpu' with page size 1 needs the package 'jax_triton'"
    ):
        jax.eval_shape(extend, *arguments(8, 1, 1))
    for num_rows in (8, 1024):
        assert lower(extend, *arguments(num_rows, 1, 8)).count("@triton_kernel_call_ffi") == 0


@pytest.mark.parametrize("page_size", [4, 16])
@pytest.mark.parametrize("check_vma", [True, False])
def test_it_lowers_inside_shard_map_on_a_part_of_the_devices(check_vma, page_size):
    mesh = Mesh(np.array(jax.devices())[[1, 4, 6]], ("sp",))
    q, _, pool, *_ = arguments(96, 3, page_size)
    int32 = functools.partial(Shape, dtype="int32")
    pool = Shape((2, 2, 39, *pool.shape[3:]), pool.dtype)
    specs = (P("sp"), P("sp"), P(None, None, "sp"), P(), P("sp"), P("sp"), P("sp"))
    mapped = jax.shard_map(
        lambda *operands: extend(*operands)[0], mesh=mesh, in_specs=specs, out_specs=P("sp"), check_vma=check_vma
    )
    module = lower(mapped, q, int32((6,)), pool, int32(()), int32((51,)), int32((3,)), int32((3,)))
    assert module.count("custom_call @mosaic_gpu_v2") == 1
    assert module.count("@triton_kernel_call_ffi") == (page_size == 4)


@pytest.mark.parametrize(("num_rows", "num_requests"), [(0, 3), (5, 0)])
def test_without_rows_or_requests_there_is_no_kernel(num_rows, num_requests):
    assert "mosaic_gpu_v2" not in lower(extend, *arguments(num_rows, num_requests, 16))


@pytest.mark.parametrize(
    ("page_size", "dtype", "head_dim", "message"),
    [(1, "float32", 128, "takes any"), (16, "float32", 128, "takes any"), (16, "bfloat16", 32, "takes any")],
)
def test_what_it_does_not_take_is_told_with_what_does(page_size, dtype, head_dim, message):
    with pytest.raises(ValueError, match=message):
        lower(extend, *arguments(8, 1, page_size, dtype, head_dim))


def test_a_gradient_is_refused():
    q, cu_q_lens, pool, *tables = (jnp.zeros(x.shape, x.dtype) for x in arguments(8, 1, 16))
    with pytest.raises(NotImplementedError, match="forward only"):
        jax.grad(lambda q: extend(q, cu_q_lens, pool, *tables)[0].astype(jnp.float32).sum())(q)


@pytest.mark.parametrize(
    ("where", "num_rows", "num_requests", "expected"),
    [
        (("cpu", "", "bfloat16", 128), 512, 1, "blockwise"),
        (("gpu", "9.0", "bfloat16", 128), 32, 1, "mosaic_gpu"),
        (("gpu", "9.0", "bfloat16", 128), 31, 1, "triton"),
        (("gpu", "9.0", "bfloat16", 128), 512, 64, "by_length"),
        (("gpu", "9.0", "bfloat16", 128), 512, 2, "by_length"),
        (("gpu", "9.0", "bfloat16", 128), 64, 2, "triton"),
        (("gpu", "9.0", "bfloat16", 256), 512, 2, "triton"),
        (("gpu", "8.0", "float16", 64), 512, 2, "triton"),
        (("gpu", "9.0", "float32", 128), 512, 1, "blockwise"),
    ],
)
def test_the_default_is_the_fastest_that_takes_the_queries(where, num_rows, num_requests, expected, monkeypatch):
    monkeypatch.setattr(api, "is_triton_usable", lambda: True)
    assert default_of(where, num_rows, num_requests) == expected


def test_few_queries_on_pages_that_are_brought_into_order_first_go_elsewhere(monkeypatch, with_triton):
    monkeypatch.setattr(api, "is_triton_usable", lambda: True)
    hopper = "gpu", "9.0", "bfloat16", 128
    assert [default_of(hopper, num, 1, page_size=1) for num in (63, 64)] == ["triton", "mosaic_gpu"]


def default_of(where: tuple, num_rows: int, num_requests: int, page_size: int = 16) -> str:
    return api.default_variant.__wrapped__(*where, page_size=page_size, num_rows=num_rows, num_requests=num_requests)


def test_without_triton_long_requests_take_the_kernel_all_the_same(monkeypatch):
    monkeypatch.setattr(api, "is_triton_usable", lambda: False)
    hopper = "gpu", "9.0", "bfloat16", 128
    assert [default_of(hopper, 512, num) for num in (1, 16, 17)] == ["mosaic_gpu", "mosaic_gpu", "blockwise"]


@pytest.fixture
def asked(monkeypatch) -> dict[str, jax.Array]:
    """The keys of each request that the two kernels are told of, which plain jax stands for."""
    lens: dict[str, jax.Array] = {}

    def stand_for(name: str):
        def attend(*operands, most_queries=10**9, tile_members=None, tuning=None, **settings):
            lens[name] = operands[-1]
            assert jnp.where(operands[-1] > 0, jnp.diff(operands[1]), 0).max() <= most_queries
            return reference_extend_attention(*operands, **settings)

        return attend

    triton = importlib.import_module("loongjax.pallas_kernels.extend_attention.triton_variant")
    monkeypatch.setattr(triton, "triton_extend_attention", stand_for("triton"))
    monkeypatch.setattr(by_length, "mosaic_gpu_extend_attention", stand_for("mosaic_gpu"))
    return lens


def test_each_request_is_attended_to_by_the_kernel_that_is_faster_for_it(asked):
    q_lens, kv_lens = [1, 32, 0, 31, 200, 1], [300, 17, 40, 12, 425, 9]
    case = make_case(0, kv_lens, page_size=16, heads=(1, H), dtype="bfloat16")
    q = random_queries(0, sum(q_lens) + 5, 2, H, "bfloat16")
    cu_q_lens = jnp.asarray(np.cumsum([0, *q_lens]), jnp.int32)
    settings = {"sm_scale": H**-0.5, "out_dtype": jnp.dtype("float32")}
    found = by_length.extend_attention_by_length(q, cu_q_lens, *case.arguments, **settings)
    truth = attend_requests(np.asarray(q), q_lens, case.keys, case.values)
    assert_matches(found, truth, "bfloat16")
    assert asked["mosaic_gpu"].tolist() == [0, 17, 0, 0, 425, 0]
    assert asked["triton"].tolist() == [300, 0, 40, 12, 0, 9]


def test_both_kernels_are_called_for_requests_of_any_length():
    module = lower(functools.partial(extend_attention, implementation="by_length"), *arguments(512, 4, 16))
    assert module.count("@mosaic_gpu_v2") == 1
    assert module.count("@triton_kernel_call_ffi") == 2, "one attends, one merges"
