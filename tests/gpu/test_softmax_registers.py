"""What the prefill kernel does on registers, each step by itself in a kernel of one warpgroup, against numpy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from loongjax.pallas_kernels.prefill_attention import mosaic_gpu_registers as registers

pytestmark = pytest.mark.gpu

ROWS = 64


def random_tile(columns: int) -> np.ndarray:
    return np.random.default_rng(columns).standard_normal((ROWS, columns)).astype(np.float32)


def on_warpgroup(step: Any, tile: np.ndarray, *rows: np.ndarray) -> np.ndarray:
    """What `step` makes of a tile [64, n] and arrays of one number a row: a tile, or a number a row."""

    gives_tile = step is not summed
    num_arrays = 1 + len(rows)

    def body(*references: Any) -> None:
        arrays_gmem, out_gmem = references[:num_arrays], references[num_arrays]
        *arrays_smem, out_smem, ready = references[num_arrays + 1 :]
        for source, target in zip(arrays_gmem, arrays_smem, strict=True):
            plgpu.copy_gmem_to_smem(source, target, ready)
        plgpu.barrier_wait(ready)
        tile_smem, *rows_smem = arrays_smem
        loaded = (plgpu.load(x, layout=registers.ROW) for x in rows_smem)
        out_smem[...] = step(plgpu.load(tile_smem, layout=registers.TILE), *loaded)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, out_gmem)
        plgpu.wait_smem_to_gmem(0)

    transforms = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))  # pyright: ignore[reportAbstractUsage]
    tile_type = plgpu.SMEM(tile.shape, jnp.float32, transforms=transforms)
    out_shape = tile.shape if gives_tile else (ROWS,)
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(out_shape, jnp.float32),
        scratch_types=[
            tile_type,
            *(plgpu.SMEM(x.shape, x.dtype) for x in rows),
            tile_type if gives_tile else plgpu.SMEM(out_shape, jnp.float32),
            plgpu.Barrier(num_arrivals=num_arrays),
        ],
        num_threads=1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(reduction_scratch_bytes=0),
    )
    return np.asarray(kernel(*map(jnp.asarray, (tile, *rows))))


def summed(tile: jax.Array) -> jax.Array:
    return registers.sum_parts(tile).sum(axis=1)


@pytest.mark.parametrize("columns", [64, 128, 256])
def test_sum_parts_adds_up_to_the_sum_of_each_row(columns):
    tile = random_tile(columns)
    np.testing.assert_allclose(on_warpgroup(summed, tile), tile.astype(np.float64).sum(axis=1), atol=1e-4)


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param([], id="none"),
        pytest.param([5], id="one row"),
        pytest.param([0, 16, 17, 63], id="rows of three warps"),
        pytest.param(range(ROWS), id="all"),
    ],
)
@pytest.mark.parametrize("columns", [64, 128])
def test_scale_rows_multiplies_each_row_by_its_factor(columns, changed):
    factor = np.ones(ROWS, np.float32)
    factor[list(changed)] = np.linspace(0.0, 2.0, len(changed))
    tile = random_tile(columns)
    np.testing.assert_array_equal(on_warpgroup(registers.scale_rows, tile, factor), tile * factor[:, None])


@pytest.mark.parametrize("columns", [64, 128, 192, 256])
def test_hide_outside_leaves_the_columns_from_begin_to_end(columns):
    tile, rng = random_tile(columns), np.random.default_rng(0)
    begin, end = rng.integers(-300, columns + 300, (2, ROWS)).astype(np.int32)
    begin[:4], end[:4] = (0, 0, columns, -(2**30)), (columns, 1, columns + 1, 2**30)
    column = np.arange(columns)
    expected = np.where((column >= begin[:, None]) & (column < end[:, None]), tile, -np.inf)
    np.testing.assert_array_equal(on_warpgroup(registers.hide_outside, tile, begin, end), expected)
