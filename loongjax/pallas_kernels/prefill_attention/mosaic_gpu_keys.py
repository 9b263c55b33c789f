"""Where Hopper's kernel finds its keys and values, and how they come to shared memory."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

TMA_ROWS = 8
"""Rows in a tile of swizzled shared memory: copies begin at multiples of it, and arrays end at one."""


class DenseKeys(NamedTuple):
    """Keys and values that lie in order."""

    k_gmem: Any  # [padded_S, K, H]
    v_gmem: Any  # [padded_S, K, H]

    @property
    def num_kv_heads(self) -> int:
        return self.k_gmem.shape[1]

    def locate(self, begin: jax.Array, block_kv: int) -> jax.Array:
        """Where the block of keys is that begins there."""
        return pl.multiple_of(begin, TMA_ROWS)

    def copy(self, place: Any, kv_head: jax.Array, tile: Any, ready: Any, *, values: bool) -> None:
        """Brings the located block of keys, or of values, to a tile of shared memory."""
        gmem = self.v_gmem if values else self.k_gmem
        plgpu.copy_gmem_to_smem(gmem.at[pl.ds(place, tile.shape[0]), kv_head], tile, ready)


class PagedKeys(NamedTuple):
    """Keys and values in pages of a pool. Entry i of the table holds the keys i * page_size and on: a block is fetched
    in as many pieces as it has pages, or parts of pages.
    """

    pool_gmem: Any  # [L * 2 * P * page_size, K, H]
    page_indices_gmem: Any  # [I]
    layer_gmem: Any  # [1]
    num_pages: int
    page_size: int

    @property
    def num_kv_heads(self) -> int:
        return self.pool_gmem.shape[1]

    def locate(self, begin: jax.Array, block_kv: int) -> list[jax.Array]:
        """The slots, of the first layer's keys, at which the block's pieces begin: all entries are loaded at once."""
        slots = []
        for offset in range(0, block_kv, math.gcd(self.page_size, block_kv)):
            key = begin + offset
            entry = jnp.minimum(key // self.page_size, self.page_indices_gmem.shape[0] - 1)
            # Entries that no request names may hold anything.
            page = jnp.clip(self.page_indices_gmem[entry], 0, self.num_pages - 1)
            slots.append(page * self.page_size + lax.rem(key, jnp.int32(self.page_size)))
        return slots

    def copy(self, place: Any, kv_head: jax.Array, tile: Any, ready: Any, *, values: bool) -> None:
        """As `DenseKeys.copy`, in as many copies as there are pieces."""
        piece = tile.shape[0] // len(place)
        first_slot = (self.layer_gmem[0] * 2 + int(values)) * self.num_pages * self.page_size

        # A loop, since copies that are unrolled take minutes to compile.
        @pl.loop(0, len(place))
        def _(number):
            slot = first_slot + functools.reduce(
                lambda found, i: jnp.where(number == i, place[i], found), range(1, len(place)), place[0]
            )
            slots = pl.ds(pl.multiple_of(slot, TMA_ROWS), piece)
            piece_of_tile = tile.at[pl.ds(pl.multiple_of(number * piece, piece), piece)]
            plgpu.copy_gmem_to_smem(self.pool_gmem.at[slots, kv_head], piece_of_tile, ready)
