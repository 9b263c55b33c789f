"""The exchange kernels lower for CUDA without a GPU, inside shard_map on a part of the devices, as they should be."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from loongjax.pallas_kernels.exchange import all_gather, all_reduce, exchange_and_merge, exchange_status
from loongjax.pallas_kernels.exchange.launch import ExchangeTuning, triton_exchange_and_merge
from loongjax.pallas_kernels.exchange.workspace import MAX_ROWS, MESSAGE_BYTES
from loongjax.pallas_kernels.triton_compile import compile_kernel
from loongjax.parallel import multi_master_decode

Shape = jax.ShapeDtypeStruct
TRITON_CALL = jax.export.DisabledSafetyCheck.custom_call("triton_kernel_call_ffi")


CUT = P("sp")


def lower(body, mesh: Mesh, *arguments: Shape, out_specs: Any = CUT, check_vma: bool = True) -> str:
    """The module that GPUs would be given, for a body of (peers, *arguments), cut over "sp"."""
    peers = Shape((*mesh.devices.shape, 3), "uint32")
    in_specs = (P(), *(CUT for _ in arguments))
    mapped = jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma)
    exported = jax.export.export(jax.jit(mapped), platforms=["cuda"], disabled_checks=[TRITON_CALL])
    return exported(peers, *arguments).mlir_module()


def num_kernels(module: str) -> int:
    return module.count("custom_call @triton_kernel_call_ffi")


def line(num_ranks: int) -> Mesh:
    return Mesh(np.array(jax.devices())[[1, 4, 6, 0, 7, 2, 3, 5][:num_ranks]], ("sp",))


@pytest.fixture
def compiled(monkeypatch) -> list[str]:
    """The PTX of what a test compiles."""
    found = []

    def record(*arguments, **settings):
        found.append(compile_kernel(*arguments, **settings).ptx)
        return compile_kernel(*arguments, **settings)

    monkeypatch.setattr("loongjax.pallas_kernels.triton_call.compile_kernel", record)
    return found


@pytest.mark.parametrize("check_vma", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(("num_ranks", "shape"), [(2, (1,)), (3, (32, 4096)), (8, (5, 77))])
def test_all_reduce_is_one_kernel_whose_result_is_the_same_on_all_ranks(num_ranks, shape, dtype, check_vma):
    def body(peers, x):
        return all_reduce(x[0], "sp", peers)

    operand = Shape((num_ranks, *shape), dtype)
    module = lower(body, line(num_ranks), operand, out_specs=P(), check_vma=check_vma)
    assert num_kernels(module) == 1
    assert "stablehlo.all_reduce" not in module


@pytest.mark.parametrize("op", [all_reduce, all_gather])
@pytest.mark.parametrize("num_ranks", [2, 5])
def test_who_would_send_more_than_4_mib_to_the_others_together_leaves_it_to_xla(op, num_ranks):
    def body(peers, x):
        return op(x[0], "sp", peers)[None]

    most = 1024 * 1024 // (num_ranks - 1)
    for num_items, expected in ((most, 1), (most + 1, 0)):
        module = lower(body, line(num_ranks), Shape((num_ranks, num_items), "float32"), check_vma=False)
        assert num_kernels(module) == expected


@pytest.mark.parametrize(("num_requests", "expected"), [(128, 1), (129, 0)])
def test_partial_outputs_count_in_float32(num_requests, expected):
    """Of 16 heads of 128 to each of four others."""

    def body(peers, o, lse):
        return exchange_and_merge(o[0], lse[0], "sp", peers, out_dtype=jnp.bfloat16)[0]

    rows = (5, 5, num_requests, 16)
    module = lower(body, line(5), Shape((*rows, 128), "float32"), Shape(rows, "float32"), check_vma=False)
    assert num_kernels(module) == expected


@pytest.mark.parametrize("check_vma", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int32", "int8", "bool"])
def test_all_gather_is_one_kernel(dtype, check_vma):
    def body(peers, x):
        return all_gather(x[0], "sp", peers)[None]

    module = lower(body, line(3), Shape((3, 33, 8, 128), dtype), check_vma=check_vma)
    assert num_kernels(module) == 1
    assert "stablehlo.all_gather" not in module


@pytest.mark.parametrize("check_vma", [False, True])
@pytest.mark.parametrize(("rows", "head_dim"), [((1, 1), 128), ((32, 32), 128), ((5, 3), 80), ((3, 2), 8)])
def test_exchange_and_merge_is_one_kernel(rows, head_dim, check_vma):
    def body(peers, o, lse):
        merged = exchange_and_merge(o[0], lse[0], "sp", peers, out_dtype="bfloat16")
        return merged[0][None], merged[1][None]

    o, lse = Shape((3, 3, *rows, head_dim), "float32"), Shape((3, 3, *rows), "float32")
    module = lower(body, line(3), o, lse, out_specs=(CUT, CUT), check_vma=check_vma)
    assert num_kernels(module) == 1
    assert "stablehlo.all_to_all" not in module


@pytest.mark.parametrize("check_vma", [False, True])
def test_a_program_on_two_axes_may_mix_them_and_return_its_status(check_vma):
    mesh = Mesh(np.array(jax.devices())[[5, 2, 0, 7]].reshape(2, 2), ("sp", "tp"))

    def body(peers, x):
        y = all_reduce(x, "tp", peers)
        y = all_gather(y, "sp", peers).sum(axis=0)
        return y, exchange_status(y, peers)

    module = lower(body, mesh, Shape((4, 100), "float32"), out_specs=(P("sp"), P(("sp", "tp"))), check_vma=check_vma)
    assert num_kernels(module) == 3


def decode_arguments(num_ranks: int) -> list[Shape]:
    """For `multi_master_decode`, stacked over ranks: 3 rows a master, and 3 n tables on every rank."""
    rows, pool = Shape((num_ranks, 3 * num_ranks), "int32"), Shape((num_ranks, 2, 2, 30, 16, 2, 64), "bfloat16")
    q, layer, indices = (
        Shape((num_ranks, 3, 8, 64), "bfloat16"),
        Shape((num_ranks,), "int32"),
        Shape((num_ranks, 50), "int32"),
    )
    return [q, pool, layer, indices, rows, rows]


@pytest.mark.parametrize("check_vma", [False, True])
def test_multi_master_decode_is_two_kernels_and_those_of_attention(check_vma):
    def body(peers, *operands):
        operands = (x[0] for x in operands)
        o, lse = multi_master_decode(*operands, axis_name="sp", implementation="triton", peers=peers)
        return o[None], lse[None]

    module = lower(body, line(3), *decode_arguments(3), out_specs=(CUT, CUT), check_vma=check_vma)
    assert num_kernels(module) == 4
    assert "stablehlo.all_" not in module


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "complex64"])
def test_what_the_kernels_do_not_take_is_left_to_xla_unless_they_are_named(dtype):
    x, o, lse = Shape((6, 8), dtype), Shape((9, 1, 2, 4100), "float32"), Shape((9, 1, 2), "float32")
    assert num_kernels(lower(lambda peers, x: all_gather(x, "sp", peers)[None], line(3), x)) == 0
    assert num_kernels(lower(lambda peers, o, lse: exchange_and_merge(o, lse, "sp", peers)[0], line(3), o, lse)) == 0
    with pytest.raises(ValueError, match=f"takes bfloat16.* got {dtype}"):
        lower(lambda peers, x: all_gather(x, "sp", peers, implementation="triton")[None], line(3), x)
    with pytest.raises(ValueError, match="takes head dims up to 4096, got 4100"):
        lower(
            lambda peers, o, lse: exchange_and_merge(o, lse, "sp", peers, implementation="triton")[0], line(3), o, lse
        )


def test_large_messages_are_left_to_xla():
    def body(peers, x, o, lse):
        y = all_reduce(x[0], "sp", peers)
        z = all_gather(x[0] + y, "sp", peers)
        return (exchange_and_merge(o[0], lse[0] + z[0, 0], "sp", peers)[0])[None]

    rows = Shape((2, 2, 1200, 8), "float32")
    module = lower(body, line(2), Shape((2, 1_200_000), "float32"), Shape((*rows.shape, 128), "float32"), rows)
    assert num_kernels(module) == 0
    for name in ("all_reduce", "all_gather", "all_to_all"):
        assert f"stablehlo.{name}" in module


def check_each_word_is_read_by_one_thread(ptx: str, num_words: int) -> None:
    """So many of a program's words are polled for twice, before a loop and in it, each by one thread, and none is read
    otherwise: copies could be of different moments. Other threads' views of them come through shared memory.
    """
    (num_threads,) = map(int, re.findall(r"\.reqntid (\d+)", ptx))
    widths = re.findall(r"ld\.volatile\.global(?:\.v(\d))?\.b(\d+)", ptx)
    status_loads = 3  # before the loop, in it, and to tell the peers
    pieces = [int(vector or 1) * int(bits) // 8 for vector, bits in widths]
    assert num_threads * (sum(pieces) - 4 * status_loads) == 2 * num_words


@pytest.mark.parametrize(
    ("size", "dtype", "word"), [(1, "bfloat16", 2), (64 * 4096, "float32", 4), (77, "bool", 2), (9_001, "int32", 8)]
)
@pytest.mark.parametrize("num_ranks", [3])
def test_no_word_of_a_gathered_message_is_read_by_two_threads(compiled, num_ranks, size, dtype, word):
    lower(lambda peers, x: all_gather(x[0], "sp", peers)[None], line(num_ranks), Shape((num_ranks, size), dtype))
    (ptx,) = compiled
    block, _, _ = ExchangeTuning().cut(size, word)
    check_each_word_is_read_by_one_thread(ptx, num_ranks * block * word)


@pytest.mark.parametrize("out_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("rows", "head_dim"), [(1, 1), (1000, 1), (7, 5), (1024, 128), (40, 4096)])
@pytest.mark.parametrize("num_ranks", [3])
def test_no_word_of_a_partial_output_is_read_by_two_threads(compiled, num_ranks, rows, head_dim, out_dtype):
    def body(peers, o, lse):
        merged = exchange_and_merge(o[0], lse[0], "sp", peers, out_dtype=out_dtype)
        return merged[0][None], merged[1][None]

    shape = (num_ranks, num_ranks, rows, 1)
    lower(body, line(num_ranks), Shape((*shape, head_dim), "float32"), Shape(shape, "float32"), out_specs=(CUT, CUT))
    (ptx,) = compiled
    (num_threads,) = map(int, re.findall(r"\.reqntid (\d+)", ptx))
    row_bytes = (2 if out_dtype == "bfloat16" else 4) * (1 << (head_dim - 1).bit_length())
    block, _, _ = ExchangeTuning().cut(rows, row_bytes, MAX_ROWS)
    said = 4 * max(2 * block, num_threads)
    check_each_word_is_read_by_one_thread(ptx, num_ranks * (block * row_bytes + said))


@pytest.mark.parametrize("out_dtype", ["float8_e4m3fn", "bfloat16", "float32"])
@pytest.mark.parametrize(("rows", "head_dim"), [(8192, 256), (600, 4096), (70_000, 8)])
@pytest.mark.parametrize("num_ranks", [2, 16])
def test_no_message_is_larger_than_its_buffer(monkeypatch, num_ranks, rows, head_dim, out_dtype):
    calls = []

    def record(*operands, out_shape, **settings):
        calls.append(settings)
        return [jnp.zeros(x.shape, x.dtype) for x in out_shape]

    monkeypatch.setattr("loongjax.pallas_kernels.exchange.launch.triton_call", record)
    shape = (num_ranks, rows, 1)
    o, lse = Shape((*shape, head_dim), "float32"), Shape(shape, "float32")
    merge = functools.partial(triton_exchange_and_merge, out_dtype=out_dtype, tuning=ExchangeTuning())
    jax.eval_shape(merge, o, lse, Shape((2 * num_ranks, 4), "uint32"))
    (call,) = calls
    word = 2 if out_dtype == "bfloat16" else 4
    assert call["block"] <= MAX_ROWS
    row_bytes = call["padded_dim"] * word
    assert call["block"] * row_bytes <= max(row_bytes, MESSAGE_BYTES // (num_ranks // 8 or 1)) <= MESSAGE_BYTES


FENCES = r"\b(?:fence|membar)\S*|\S*(?:release|acquire|acq_rel)\S*"


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_no_message_waits_for_a_fence_and_all_warps_end_a_wait_together(compiled, num_ranks):
    lower(lambda peers, x: all_reduce(x[0], "sp", peers), line(num_ranks), Shape((num_ranks, 64, 4096), "bfloat16"))
    (ptx,) = compiled
    assert not re.findall(FENCES, ptx)
    polled = [m.start() for m in re.finditer(r"ld\.volatile\.global\.v4", ptx)]
    # Once before the loop, once in it.
    assert len(polled) == 2 * num_ranks
    sent = [m.start() for m in re.finditer(r"st\.global\.v4", ptx) if m.start() < polled[0]]
    assert len(sent) == num_ranks - 1
    assert "bar.sync" not in ptx[min(sent) : polled[0]]
    # All warps take the time that one of them read, so that all end a wait or none does.
    (time,) = (m.end() for m in re.finditer("%globaltimer", ptx))
    shared = ptx[time : ptx.index("bra", time)]
    assert "ld.shared" in shared[shared.index("bar.sync", shared.rindex("st.shared")) :]


def test_between_two_rounds_what_was_cleared_is_so_for_all(compiled):
    def body(peers, x):
        return all_reduce(x[0], "sp", peers, implementation="triton")

    lower(body, line(2), Shape((2, 3_000_000), "float32"))
    (ptx,) = compiled
    (fence,) = re.finditer(FENCES, ptx)
    assert fence.group() == "atom.global.sys.acq_rel.or.b32"
    cleared = max(m.start() for m in re.finditer(r"st\.global\.v4", ptx))
    assert "bar.sync" in ptx[cleared : fence.start()]
    assert "bar.sync" in ptx[fence.end() : ptx.index("bra", fence.end())]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_messages_move_in_pieces_of_16_bytes(compiled, dtype):
    lower(lambda peers, x: all_reduce(x[0], "sp", peers), line(2), Shape((2, 64, 4096), dtype))
    (ptx,) = compiled
    assert set(re.findall(r"ld\.volatile\.global\.v\S*", ptx)) == {"ld.volatile.global.v4.b32"}
    assert ptx.count("st.global.v4.b32") >= 2


@pytest.mark.parametrize("out_dtype", ["bfloat16", "float32"])
def test_partial_outputs_move_in_large_pieces(compiled, out_dtype):
    def body(peers, o, lse):
        merged = exchange_and_merge(o[0], lse[0], "sp", peers, out_dtype=out_dtype)
        return merged[0][None], merged[1][None]

    o, lse = Shape((2, 2, 64, 32, 128), "float32"), Shape((2, 2, 64, 32), "float32")
    lower(body, line(2), o, lse, out_specs=(CUT, CUT))
    (ptx,) = compiled
    assert ptx.count("ld.global.v4.b32") >= 2
    assert set(re.findall(r"ld\.volatile\.global\.v\S*", ptx)) == {"ld.volatile.global.v4.b32"}
    assert ptx.count("st.global.v4.b32") >= 2
