"""Cases of decode and extend attention, over pools whose pages lie in random order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from loongjax.pallas_kernels import decode_attention, extend_attention
from loongjax_profiling.kernels.case import Case, Repeat

HEAD_DIM = 128
DECODE_MIXES: dict[str, tuple[Sequence[int], tuple[int, int]]] = {
    "32 x 16K, 32/8": ([16384] * 32, (32, 8)),
    "8 x 16K, 32/32": ([16384] * 8, (32, 32)),
    "256 x 1K, 32/8": ([1024] * 256, (32, 8)),
    "1 x 128K + 255 x 1K, 32/8": ([131072] + [1024] * 255, (32, 8)),
    "1 x 128K, 32/8": ([131072], (32, 8)),
    "1 x 1K, 32/8": ([1024], (32, 8)),
}
EXTENSIONS = [(512, 32768), (512, 131072), (4, 131072)]
"""New tokens, and keys before them; 32/8 heads."""
PAGE_SIZES = (16, 64, 1)

Attend = Callable[[Any, jax.Array], jax.Array]
"""An op, given its keys and values and the queries."""


def decode_cases(variant: str, shrink: int) -> Iterator[Case]:
    """Every mix at every page size; `shrink` divides the lengths."""
    for page_size in PAGE_SIZES:
        for mix, (lengths, heads) in DECODE_MIXES.items():
            kv_lens = [max(1, length // shrink) for length in lengths]
            yield Case(
                op="decode_attention",
                work=f"{mix}, page size {page_size}",
                variant=variant,
                amount=4.0 * sum(kv_lens) * heads[1] * HEAD_DIM,
                unit="B",
                build=lambda kv_lens=kv_lens, heads=heads, page_size=page_size: _decode(
                    variant, kv_lens, heads, page_size
                ),
            )


def extend_cases(variant: str, shrink: int) -> Iterator[Case]:
    """Every extension at page sizes 16 and 1; `shrink` divides the lengths."""
    heads = (32, 8)
    for new, old in EXTENSIONS:
        num_new, num_old = max(1, new // shrink), max(1, old // shrink)
        for page_size in (16, 1):
            yield Case(
                op="extend_attention",
                work=f"{new} on {old // 1024}K, 32/8, page size {page_size}",
                variant=variant,
                amount=4.0 * num_new * num_old * heads[0] * HEAD_DIM,
                unit="FLOP",
                build=lambda num_new=num_new, num_old=num_old, page_size=page_size: _extend(
                    variant, num_new, num_old, heads, page_size
                ),
            )


def _pool_and_tables(
    kv_lens: Sequence[int], num_kv_heads: int, page_size: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    pages_of = [-(-kv_len // page_size) for kv_len in kv_lens]
    shape = (1, 2, sum(pages_of), page_size, num_kv_heads, HEAD_DIM)
    tables = (
        jnp.asarray(np.random.default_rng(0).permutation(sum(pages_of)), jnp.int32),
        jnp.asarray(np.cumsum([0, *pages_of[:-1]]), jnp.int32),
        jnp.asarray(kv_lens, jnp.int32),
    )
    return jax.random.normal(jax.random.key(0), shape, jnp.bfloat16), tables


def _decode(variant: str, kv_lens: Sequence[int], heads: tuple[int, int], page_size: int) -> Repeat:
    pool, tables = _pool_and_tables(kv_lens, heads[1], page_size)
    q = jax.random.normal(jax.random.key(1), (len(kv_lens), heads[0], HEAD_DIM), jnp.bfloat16)

    def attend(pool: jax.Array, q: jax.Array) -> jax.Array:
        return decode_attention(q, pool, jnp.int32(0), *tables, implementation=variant)[0]

    return chain(attend, pool, q)


def _extend(variant: str, num_new: int, num_old: int, heads: tuple[int, int], page_size: int) -> Repeat:
    pool, tables = _pool_and_tables([num_old], heads[1], page_size)
    q = jax.random.normal(jax.random.key(1), (num_new, heads[0], HEAD_DIM), jnp.bfloat16)
    cu_q_lens = jnp.array([0, num_new], jnp.int32)

    def attend(pool: jax.Array, q: jax.Array) -> jax.Array:
        return extend_attention(q, cu_q_lens, pool, jnp.int32(0), *tables, implementation=variant)[0]

    return chain(attend, pool, q)


def chain(attend: Attend, keys: Any, q: jax.Array) -> Repeat:
    """Repetitions of attend(keys, q), each with the output of the one before as its queries."""

    def repeat(num: int) -> Callable[[], jax.Array]:
        def run(keys: Any, q: jax.Array) -> jax.Array:
            if jax.default_backend() != "gpu":
                return jax.lax.fori_loop(0, num, lambda _, q: attend(keys, q), q)
            for _ in range(num):  # on a GPU a loop would launch kernels of its own to count
                q = attend(keys, q)
            return q

        call = jax.jit(run)
        return lambda: call(keys, q)

    return repeat
