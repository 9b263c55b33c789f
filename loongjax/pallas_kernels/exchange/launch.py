"""How the kernels are called."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32, Shaped, UInt32

from loongjax.errors import ConfigError
from loongjax.pallas_kernels.exchange.kernels import gather_kernel, merge_kernel, reduce_kernel, status_kernel
from loongjax.pallas_kernels.exchange.workspace import MAX_PROGRAMS, MAX_ROWS, MESSAGE_BYTES
from loongjax.pallas_kernels.triton_call import triton_call

WARP = 32
LEAST_CHUNK_BYTES = 8 * WARP
"""A word for each thread of a warp: `kernels` says why no thread may go without."""
MOST_RANKS_AT_ONCE = 8
"""Of whose messages a program holds one of the largest size each in registers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExchangeTuning:
    """How a message is cut into chunks, of so many bytes as they travel. All ranks must use the same."""

    max_programs: int = MAX_PROGRAMS
    """Of a grid; at most as many as there are channels."""
    min_chunk_bytes: int = 2048
    """Small messages are cut no finer: a power of two."""
    max_chunk_bytes: int = MESSAGE_BYTES
    """What is larger takes several rounds: a power of two, at most a message."""
    num_warps: int = 8
    """At most."""

    def __post_init__(self) -> None:
        if not 1 <= self.max_programs <= MAX_PROGRAMS:
            raise ConfigError(f"max_programs must be 1 to {MAX_PROGRAMS}, got {self.max_programs}")
        for name in ("min_chunk_bytes", "max_chunk_bytes"):
            value = getattr(self, name)
            if not LEAST_CHUNK_BYTES <= value <= MESSAGE_BYTES or value & (value - 1):
                raise ConfigError(
                    f"{name} must be a power of two from {LEAST_CHUNK_BYTES} to {MESSAGE_BYTES}, got {value}"
                )
        if self.min_chunk_bytes > self.max_chunk_bytes:
            raise ConfigError(
                f"min_chunk_bytes must not exceed max_chunk_bytes, got {self.min_chunk_bytes} > {self.max_chunk_bytes}"
            )

    def cut(self, num_items: int, item_bytes: int, most_items: int | None = None) -> tuple[int, int, int]:
        """Items of a chunk, at most so many, programs, and rounds, for a message of so many items; an item is never
        cut.

        Raises:
            ValueError: items larger than a chunk.
        """
        padded_bytes = _power_of_two(item_bytes)
        most = self.max_chunk_bytes // padded_bytes
        if most == 0:
            raise ValueError(f"items of {item_bytes} bytes do not fit chunks of {self.max_chunk_bytes}")
        most = min(most, most_items or most)
        fewest = max(1, self.min_chunk_bytes // padded_bytes)
        chunk = min(most, max(fewest, _power_of_two(math.ceil(num_items / self.max_programs))))
        num_chunks = math.ceil(num_items / chunk)
        programs = min(num_chunks, self.max_programs)
        return chunk, programs, math.ceil(num_chunks / programs)

    def warps_for(self, num_elements: int) -> int:
        """Of a program that reads so many elements at a time, which are at least as many as its threads."""
        assert num_elements >= WARP, num_elements
        return min(self.num_warps, num_elements // WARP)


def triton_all_reduce(
    x: Float[Array, "*shape"], group: UInt32[Array, "two_n 4"], *, tuning: ExchangeTuning
) -> Float[Array, "*shape"]:
    """See `all_reduce`. There is at least one element."""
    (out,) = _exchange(reduce_kernel, "exchange_reduce", x, group, jax.ShapeDtypeStruct(x.shape, x.dtype), tuning)
    return out


def triton_all_gather(
    x: Shaped[Array, "*shape"], group: UInt32[Array, "two_n 4"], *, tuning: ExchangeTuning
) -> Shaped[Array, "n *shape"]:
    """See `all_gather`. There is at least one element."""
    result = jax.ShapeDtypeStruct((len(group) // 2, *x.shape), x.dtype)
    (out,) = _exchange(gather_kernel, "exchange_gather", x, group, result, tuning)
    return out


def triton_exchange_and_merge(
    o: Float32[Array, "n B N H"],
    lse: Float32[Array, "n B N"],
    group: UInt32[Array, "two_n 4"],
    *,
    out_dtype: DTypeLike,
    tuning: ExchangeTuning,
) -> tuple[Float[Array, "B N H"], Float32[Array, "B N"]]:
    """See `exchange_and_merge`. There is at least one row.

    Raises:
        ValueError: a head dim beyond a message.
    """
    num_ranks, B, N, H = o.shape
    padded_dim = _power_of_two(H)
    row_bytes = padded_dim * (2 if jnp.dtype(out_dtype).itemsize == 2 else 4)
    most_rows = min(MAX_ROWS, _most_bytes(num_ranks) // row_bytes)
    block, programs, num_rounds = tuning.cut(B * N, row_bytes, max(1, most_rows))
    num_warps = tuning.warps_for(block * padded_dim)
    merged_o, merged_lse = triton_call(
        o,
        lse,
        group,
        kernel=merge_kernel,
        name="exchange_merge",
        out_shape=[jax.ShapeDtypeStruct((B, N, H), out_dtype), jax.ShapeDtypeStruct((B, N), jnp.float32)],
        grid=(programs,),
        num_warps=num_warps,
        num_rows=B * N,
        head_dim=H,
        padded_dim=padded_dim,
        num_ranks=num_ranks,
        block=block,
        copies=max(2, WARP * num_warps // block),
        num_rounds=num_rounds,
    )
    return merged_o, merged_lse


def triton_status(after: Shaped[Array, "*shape"], group: UInt32[Array, "two_n 4"]) -> Int32[Array, "1"]:
    """See `exchange_status`."""
    (status,) = triton_call(
        after,
        group,
        kernel=status_kernel,
        name="exchange_status",
        out_shape=[jax.ShapeDtypeStruct((1,), jnp.int32)],
        grid=(1,),
        num_warps=1,
        num_ranks=len(group) // 2,
    )
    return status


def _exchange(
    kernel: Any, name: str, x: jax.Array, group: jax.Array, result: jax.ShapeDtypeStruct, tuning: ExchangeTuning
) -> Any:
    num_ranks, item_bytes = len(group) // 2, _sent_bytes(x.dtype)
    block, programs, num_rounds = tuning.cut(x.size, item_bytes, _most_bytes(num_ranks) // item_bytes)
    return triton_call(
        x,
        group,
        kernel=kernel,
        name=name,
        out_shape=[result],
        grid=(programs,),
        num_warps=tuning.warps_for(block),
        size=x.size,
        num_ranks=num_ranks,
        block=block,
        num_rounds=num_rounds,
    )


def _sent_bytes(dtype: jnp.dtype) -> int:
    """Of an element on its way: `encode` says why."""
    return dtype.itemsize if jnp.issubdtype(dtype, jnp.floating) else 2 * dtype.itemsize


def _most_bytes(num_ranks: int) -> int:
    """Of a chunk between so many."""
    return MESSAGE_BYTES * MOST_RANKS_AT_ONCE // max(MOST_RANKS_AT_ONCE, _power_of_two(num_ranks))


def _power_of_two(number: int) -> int:
    """The least that is not less."""
    return 1 << (number - 1).bit_length()
