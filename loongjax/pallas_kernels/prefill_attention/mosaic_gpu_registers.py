"""Steps of the online softmax that Pallas has no words for, since they speak of what a single thread or warp holds.

In wgmma's layout four neighbouring threads share a row, each with two neighbouring columns of every eight.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, nvvm, scf, vector

TILE = plgpu.Layout.WGMMA
ROW = TILE.reduce(1)
PART_COLUMNS = 8
"""The narrowest tile that there is."""
WORD_COLUMNS = 128
"""Of a row, of which a thread holds 32."""


def scale_rows(tile: jax.Array, factor: jax.Array) -> jax.Array:
    """The product of a tile [64, n] with a factor a row [64]. Warps that hold no factor but 1 skip it."""

    @_on_registers((TILE, ROW), tile.shape, tile.dtype, TILE)
    def scale(tile: Any, factor: Any) -> Any:
        one = mgpu_utils.c(1.0, ir.F32Type.get())
        differs = [arith.cmpf(arith.CmpFPredicate.UNE, _scalar(x), one) for x in factor.registers.flat]
        # Separate registers, as wgmma takes them: LLVM would pair up those of the other layout across the branch.
        apart = plgpu.Layout._WGMMA_ACC_32BIT.to_mgpu()
        before = tile.to_layout(apart)
        branch = scf.IfOp(_any_of_warp(differs), [x.type for x in before.registers.flat], has_else=True)
        with ir.InsertionPoint(branch.then_block):
            product = tile * factor.broadcast_in_dim(tile.shape, (0,), tile.layout)
            scf.yield_(list(product.to_layout(apart).registers.flat))
        assert branch.else_block is not None
        with ir.InsertionPoint(branch.else_block):
            scf.yield_(list(before.registers.flat))
        return _array(list(branch.results), before).to_layout(tile.layout)

    return scale(tile, factor)


def sum_parts(tile: jax.Array) -> jax.Array:
    """Columns of a tile [64, n] added up to [64, 8], so that no thread needs what others hold."""

    @_on_registers((TILE,), (tile.shape[0], PART_COLUMNS), tile.dtype, TILE)
    def add(tile: Any) -> Any:
        column_groups = np.moveaxis(tile.registers, 1, 0)
        parts = functools.reduce(np.frompyfunc(arith.addf, 2, 1), column_groups)[:, None]
        return mgpu.FragmentedArray(_registers=parts, _layout=tile.layout, _is_signed=None)

    return add(tile)


def hide_outside(tile: jax.Array, begin: jax.Array, end: jax.Array) -> jax.Array:
    """A tile [64, n] with -inf in the columns before `begin` and from `end` on, which are given a row [64].

    Which of its columns a row shows is a bit each: a comparison for each would take twice the instructions.
    """

    @_on_registers((TILE, ROW, ROW), tile.shape, tile.dtype, TILE)
    def hide(tile: Any, begin: Any, end: Any) -> Any:
        first_column = arith.muli(arith.remui(mgpu_utils.thread_idx(), _i32(4)), _i32(2))
        lowest = mgpu_utils.c(-np.inf, ir.F32Type.get())
        # [rows of a thread, column groups]
        registers = np.moveaxis(tile.registers, 1, -1)
        rows = registers.reshape(-1, registers.shape[-1])
        hidden = np.empty_like(rows)
        bounds = zip(map(_scalar, begin.registers.flat), map(_scalar, end.registers.flat), strict=True)
        for row, (row_begin, row_end) in enumerate(bounds):
            words = []
            for offset in range(0, tile.shape[1], WORD_COLUMNS):
                first = arith.addi(first_column, _i32(offset))
                before, behind = (_bits_below(arith.subi(bound, first)) for bound in (row_begin, row_end))
                words.append(arith.andi(behind, arith.xori(before, _i32(-1))))
            for group in range(rows.shape[1]):
                word, place = divmod(8 * group, WORD_COLUMNS)
                pair = rows[row, group]
                for column in range(2):
                    bit = np.uint32(1 << place // 4 + column).astype(np.int32).item()
                    is_shown = arith.cmpi(arith.CmpIPredicate.ne, arith.andi(words[word], _i32(bit)), _i32(0))
                    score = arith.select(is_shown, _scalar(pair, column), lowest)
                    pair = vector.insert(score, pair, [], ir.DenseI64ArrayAttr.get([column]))
                hidden[row, group] = pair
        hidden = np.moveaxis(hidden.reshape(registers.shape), -1, 1)
        return mgpu.FragmentedArray(_registers=hidden, _layout=tile.layout, _is_signed=None)

    return hide(tile, begin, end)


def _bits_below(column: Any) -> Any:
    """A bit for each of a thread's 32 columns of a word: whether it is below, counted from the thread's first one."""
    groups, rest = arith.shrsi(column, _i32(3)), arith.andi(column, _i32(7))
    count = arith.addi(arith.muli(groups, _i32(2)), arith.minsi(rest, _i32(2)))
    count = arith.maxsi(count, _i32(0))
    some = arith.subi(arith.shli(_i32(1), arith.andi(count, _i32(31))), _i32(1))
    return arith.select(arith.cmpi(arith.CmpIPredicate.sge, count, _i32(32)), _i32(-1), some)


def _any_of_warp(conditions: list[ir.Value]) -> ir.Value:
    return nvvm.vote_sync(_i32(-1), functools.reduce(arith.ori, conditions), "any")


def _i32(value: int) -> ir.Value:
    return mgpu_utils.c(value, ir.IntegerType.get_signless(32))


def _scalar(register: ir.Value, place: int = 0) -> ir.Value:
    return vector.extract(register, [], ir.DenseI64ArrayAttr.get([place]))


def _array(registers: list[ir.Value], like: Any) -> Any:
    shaped = np.array(registers, object).reshape(like.registers.shape)
    return mgpu.FragmentedArray(_registers=shaped, _layout=like.layout, _is_signed=None)


def _on_registers(arguments: tuple[Any, ...], shape: tuple[int, ...], dtype: Any, layout: Any) -> Any:
    """Decorates a function of fragmented arrays in layouts `arguments` that gives one."""

    def decorate(function: Any) -> Any:
        result = plgpu.ShapeDtypeStruct(shape, jnp.dtype(dtype), layout=layout)
        return plgpu.inline_mgpu(arg_types=arguments, return_type=result)(lambda _, *arrays: function(*arrays))

    return decorate
