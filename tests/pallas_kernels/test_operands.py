"""What operands must have in common, for callers whose annotations nobody checks.

Those of the tests are checked, so the ops are called without what checks them.
"""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loongjax.pallas_kernels import (
    decode_attention,
    extend_attention,
    kv_update,
    merge_attention,
    merge_partials,
    prefill_attention,
)
from loongjax.pallas_kernels.operands import check_heads, check_shapes, scale_or_default

Shape = jax.ShapeDtypeStruct
T, S, N, K, H, B, PAGES, PAGE_SIZE = 5, 7, 4, 2, 16, 3, 6, 8
Q, KV, POOL = Shape((T, N, H), "float32"), Shape((S, K, H), "float32"), Shape((2, 2, PAGES, PAGE_SIZE, K, H), "float32")
TABLES = {
    "kv_pool": POOL,
    "layer": Shape((), "int32"),
    "page_indices": Shape((PAGES,), "int32"),
    "page_starts": Shape((B,), "int32"),
    "kv_lens": Shape((B,), "int32"),
}
OPERANDS = {
    prefill_attention: {"q": Q, "k": KV, "v": KV, "k_start": Shape((T,), "int32"), "k_end": Shape((T,), "int32")},
    decode_attention: {"q": Shape((B, N, H), "float32"), **TABLES},
    extend_attention: {"q": Q, "cu_q_lens": Shape((B + 1,), "int32"), **TABLES},
    kv_update: {
        "kv_pool": POOL,
        "k": Shape((T, K, H), "float32"),
        "v": Shape((T, K, H), "float32"),
        "layer": Shape((), "int32"),
        "slots": Shape((T,), "int32"),
    },
}
"""Of each op, such as fit."""


def trace(op, operands: dict[str, Shape], **settings):
    """What the op gives, in shapes; nothing runs."""
    plain = inspect.unwrap(op)
    return jax.eval_shape(lambda operands: plain(**operands, **settings), operands)


def cases(change) -> list:
    """(op, operand, that operand changed) for every operand that `change` makes something of."""
    found = [(op, name, change(op, name, x)) for op, operands in OPERANDS.items() for name, x in operands.items()]
    return [pytest.param(*case, id=f"{case[0].__name__} {case[1]}") for case in found if case[2] is not None]


def one_less(dim: int):
    """Every operand that has this dim, with one less in it, but for those that fit so, too."""

    def change(op, name: str, x: Shape) -> Shape | None:
        free_dims = {"kv_pool": (-6, -4, -3, -2), "page_indices": (-1,), "q": (-3,) if op is extend_attention else ()}
        if len(x.shape) < -dim or (dim in free_dims.get(name, ()) and (op, dim) != (kv_update, -2)):
            return None
        return Shape(tuple(size - (i == len(x.shape) + dim) for i, size in enumerate(x.shape)), x.dtype)

    return change


def floats(change):
    """Only those operands that are floating-point numbers."""
    return lambda op, name, x: change(op, name, x) if x.dtype == "float32" else None


@pytest.mark.parametrize("op", OPERANDS)
def test_operands_that_fit_are_taken(op):
    trace(op, OPERANDS[op])


@pytest.mark.parametrize(("op", "name", "changed"), [case for dim in range(-6, 0) for case in cases(one_less(dim))])
def test_a_dim_that_does_not_fit_the_others_is_refused(op, name, changed):
    with pytest.raises(ValueError, match=f"^{op.__name__}: .*(must have the shape .* got|must be a multiple)"):
        trace(op, OPERANDS[op] | {name: changed})


@pytest.mark.parametrize(
    ("op", "name", "changed"),
    cases(lambda op, name, x: Shape((*x.shape, 1), x.dtype))
    + cases(lambda op, name, x: Shape(x.shape[1:], x.dtype) if x.shape else None),
)
def test_a_dim_too_many_or_too_few_is_refused(op, name, changed):
    with pytest.raises(ValueError, match=f"^{op.__name__}: .* must have the shape .* got"):
        trace(op, OPERANDS[op] | {name: changed})


@pytest.mark.parametrize(
    ("op", "name", "changed"),
    cases(floats(lambda op, name, x: Shape((*x.shape[:-1], 1), x.dtype))),
)
def test_a_head_dim_of_one_is_not_repeated(op, name, changed):
    with pytest.raises(ValueError, match=r"must have the shape \[.*H=1?6?\], got"):
        trace(op, OPERANDS[op] | {name: changed})


@pytest.mark.parametrize(
    ("op", "name", "changed"),
    cases(floats(lambda op, name, x: None if (op, name) == (kv_update, "kv_pool") else Shape(x.shape, "bfloat16"))),
)
def test_two_dtypes_are_refused(op, name, changed):
    with pytest.raises(ValueError, match=rf"^{op.__name__}: .* must have one dtype, got .*bfloat16"):
        trace(op, OPERANDS[op] | {name: changed})


@pytest.mark.parametrize("op", OPERANDS)
@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64"])
def test_keys_are_floating_point_numbers(op, dtype):
    operands = {k: Shape(x.shape, dtype) if x.dtype == "float32" else x for k, x in OPERANDS[op].items()}
    with pytest.raises(ValueError, match=f"^{op.__name__}: .* must be of a floating dtype, got {dtype}"):
        trace(op, operands)


@pytest.mark.parametrize("dtype", ["float32", "int8", "uint32", "bool"])
@pytest.mark.parametrize(("op", "name", "changed"), cases(lambda op, name, x: x if x.dtype == "int32" else None))
def test_what_counts_or_points_is_int32(op, name, changed, dtype):
    with pytest.raises(ValueError, match=f"^{op.__name__}: {name} must be int32, got {dtype}"):
        trace(op, OPERANDS[op] | {name: Shape(changed.shape, dtype)})


@pytest.mark.parametrize("implementation", ["reference", "blockwise", "mosaic_gpu", "triton", "by_length"])
def test_every_implementation_refuses_the_same(implementation):
    pages, bounds = {"page_starts": Shape((2,), "int32")}, {"k_end": Shape((3,), "int32")}
    for op, changed in ((decode_attention, pages), (extend_attention, pages), (prefill_attention, bounds)):
        with pytest.raises(ValueError, match=r"must have the shape \[\w=\d\], got \[\d\]"):
            trace(op, OPERANDS[op] | changed, implementation=implementation)


def test_arrays_of_numpys_own_integers_are_taken():
    ranges = {"k_start": np.zeros(T, np.int64), "k_end": np.full(T, 3)}
    arrays = {name: jnp.ones(x.shape) for name, x in OPERANDS[prefill_attention].items() if name in "qkv"}
    o, _ = inspect.unwrap(prefill_attention)(**arrays, **ranges)
    np.testing.assert_allclose(o, np.ones((T, N, H)), rtol=1e-6)


def test_a_shape_is_named_with_the_sizes_that_are_known():
    message = "op: v must have the shape [S=7, K=2, H=16], got [7, 1, 16]"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_shapes("op", k=(np.zeros((7, 2, 16)), "S K H"), v=(np.zeros((7, 1, 16)), "S K H"))
    with pytest.raises(ValueError, match=r"pool must have the shape \[P=5, 2, B\+1\], got \[5, 3, 4\]"):
        check_shapes("op", pool=(np.zeros((5, 3, 4)), "P 2 B+1"))
    with pytest.raises(ValueError, match=r"q must have the shape \[T, N\], got \[5\]"):
        check_shapes("op", q=(np.zeros(5), "T N"))
    with pytest.raises(ValueError, match=r"ends must have the shape \[B\+1=4\], got \[3\]"):
        check_shapes("op", lens=(np.zeros(3), "B"), ends=(np.zeros(3), "B+1"))


def test_a_name_twice_in_one_shape_is_one_size():
    check_shapes("op", x=(np.zeros((3, 3)), "n n"))
    with pytest.raises(ValueError, match=r"x must have the shape \[n=3, n=3\], got \[3, 4\]"):
        check_shapes("op", x=(np.zeros((3, 4)), "n n"))


def test_keys_without_heads_are_refused():
    with pytest.raises(ValueError, match="op: query heads must be a multiple of KV heads, got 4 and 0"):
        check_heads("op", 4, 0)


@pytest.mark.parametrize("num_q_heads", [2, 4, 6])
def test_any_multiple_of_the_kv_heads_groups(num_q_heads):
    check_heads("op", num_q_heads, 2)


def test_log_sum_exps_of_other_rows_are_not_merged():
    o, lse = jnp.ones((2, 3, 4, 8)), jnp.ones((2, 3, 1))
    with pytest.raises(ValueError, match=r"need log-sum-exps \[2, 3, 4\], got \[2, 3, 1\]"):
        inspect.unwrap(merge_partials)(o, lse)
    with pytest.raises(ValueError, match="same shape"):
        inspect.unwrap(merge_attention)(o[0], lse[0], o[0, :, :2], lse[0])


@pytest.mark.parametrize("sm_scale", [0.5, np.float32(0.5), np.array(0.5), jnp.float32(0.5), jnp.bfloat16(0.5)])
@pytest.mark.parametrize("op", [prefill_attention, decode_attention, extend_attention])
def test_a_scale_may_be_any_scalar_that_is_known(op, sm_scale):
    arrays = {name: jnp.ones(x.shape, x.dtype) for name, x in OPERANDS[op].items()}
    for found, expected in zip(op(**arrays, sm_scale=sm_scale), op(**arrays, sm_scale=0.5), strict=True):
        np.testing.assert_array_equal(found, expected)
    jax.eval_shape(lambda x: op(**x, sm_scale=sm_scale), OPERANDS[op])


@pytest.mark.parametrize("op", [prefill_attention, decode_attention, extend_attention])
def test_a_scale_that_is_traced_is_refused(op):
    with pytest.raises(TypeError, match=f"{op.__name__}: sm_scale .* cannot be traced: give a Python float"):
        jax.eval_shape(lambda x, scale: op(**x, sm_scale=scale), OPERANDS[op], Shape((), "float32"))


def test_a_scale_is_one_number():
    with pytest.raises(TypeError, match=r"op: sm_scale must be a scalar, got the shape \[1\]"):
        scale_or_default("op", np.ones(1), 16)
    assert scale_or_default("op", None, 16) == 0.25
