"""Cases of the ops on the paged pool, whose pages lie in random order: decode and extend attention, and kv_update."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from loongjax.pallas_kernels import decode_attention, extend_attention, kv_update, prefill_attention
from loongjax.pallas_kernels.extend_attention import api as extend_api
from loongjax_profiling.kernels.case import Case, Repeat
from loongjax_profiling.kernels.chain import chain, repeat_step

HEAD_DIM = 128
POOL_BYTES = 1e9
"""At least, on a GPU: more than ten times an H200's L2. Repetitions go through the layers."""
DECODE_MIXES: dict[str, tuple[Sequence[int], tuple[int, int]]] = {
    "32 x 16K, 32/8": ([16384] * 32, (32, 8)),
    "8 x 16K, 32/32": ([16384] * 8, (32, 32)),
    "256 x 1K, 32/8": ([1024] * 256, (32, 8)),
    "1 x 128K + 255 x 1K, 32/8": ([131072] + [1024] * 255, (32, 8)),
    "1 x 256K, 32/8": ([262144], (32, 8)),
    "1 x 1K, 32/8": ([1024], (32, 8)),
}
DECODE_SHARES = {16: 0.92, 64: 0.92, 1: 0.88}
"""Of a copy, by page size."""
SHORT_MIX = "1 x 1K, 32/8"
SHORT_DECODE_S = 12e-6
EXTENSIONS = [(512, 32768), (512, 131072), (4, 131072)]
"""New tokens, and keys before them; 32/8 heads."""
EXTEND_SHARE = 0.8
"""Of prefill attention's rate over the same pairs, for 512 new tokens."""
UPDATES = [(32, 8), (32, 32), (8192, 8), (8192, 32)]
"""New tokens, KV heads."""
UPDATE_PAGE_SIZE = 16


def decode_cases(variant: str, shrink: int) -> Iterator[Case]:
    """Every mix at every page size; `shrink` divides the lengths, and there are targets if it is 1."""
    for page_size, share in DECODE_SHARES.items():
        for mix, (lengths, heads) in DECODE_MIXES.items():
            kv_lens = [max(1, length // shrink) for length in lengths]
            is_short = mix == SHORT_MIX
            yield Case(
                op="decode_attention",
                work=f"{mix}, page size {page_size}",
                variant=variant,
                amount=4.0 * sum(kv_lens) * heads[1] * HEAD_DIM,
                unit="B",
                build=lambda kv_lens=kv_lens, heads=heads, page_size=page_size: _decode(
                    variant, kv_lens, heads, page_size
                ),
                least_share=share if shrink == 1 and not is_short else None,
                most_seconds=SHORT_DECODE_S if shrink == 1 and is_short else None,
            )


def extend_cases(variant: str | None, shrink: int, *, prefill_variant: str) -> Iterator[Case]:
    """Every extension at page sizes 16 and 1, beside prefill attention; `shrink` divides the lengths. Without a variant
    each case takes its default here.
    """
    heads = (32, 8)
    for new, old in EXTENSIONS:
        num_new, num_old = max(1, new // shrink), max(1, old // shrink)
        unpaged = f"{new} on {old // 1024}K, 32/8, no pages"
        amount = 4.0 * num_new * num_old * heads[0] * HEAD_DIM
        for page_size in (16, 1):
            chosen = variant or default_extend_variant(page_size, num_new)
            yield Case(
                op="extend_attention",
                work=f"{new} on {old // 1024}K, 32/8, page size {page_size}",
                variant=chosen,
                amount=amount,
                unit="FLOP",
                build=lambda chosen=chosen, num_new=num_new, num_old=num_old, page_size=page_size: _extend(
                    chosen, num_new, num_old, heads, page_size
                ),
                baseline=(unpaged, f"prefill {prefill_variant}"),
                least_share=EXTEND_SHARE if shrink == 1 and new == 512 else None,
            )
        yield Case(
            op="extend_attention",
            work=unpaged,
            variant=f"prefill {prefill_variant}",
            amount=amount,
            unit="FLOP",
            build=lambda num_new=num_new, num_old=num_old: _prefill(prefill_variant, num_new, num_old, heads),
        )


def default_extend_variant(page_size: int, num_new: int) -> str:
    """What extend attention takes here by itself for one request of so many new tokens."""
    device = jax.local_devices()[0]
    where = device.platform, getattr(device, "compute_capability", ""), "bfloat16", HEAD_DIM
    return extend_api.default_variant(*where, page_size=page_size, num_rows=num_new, num_requests=1)


def update_cases(variant: str, shrink: int) -> Iterator[Case]:
    """A decode step's tokens, and a chunk's; `shrink` divides their number. Bytes are those read and written."""
    for new, num_kv_heads in UPDATES:
        num_tokens = max(1, new // shrink)
        yield Case(
            op="kv_update",
            work=f"{new} tokens, {num_kv_heads} KV heads, page size {UPDATE_PAGE_SIZE}",
            variant=variant,
            amount=8.0 * num_tokens * num_kv_heads * HEAD_DIM,
            unit="B",
            build=lambda num_tokens=num_tokens, num_kv_heads=num_kv_heads: _update(variant, num_tokens, num_kv_heads),
        )


def _random(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def _random_pool(num_pages: int, page_size: int, num_kv_heads: int) -> jax.Array:
    layer_bytes = 4.0 * num_pages * page_size * num_kv_heads * HEAD_DIM
    num_layers = math.ceil(POOL_BYTES / layer_bytes) if jax.default_backend() == "gpu" else 1
    return _random(0, num_layers, 2, num_pages, page_size, num_kv_heads, HEAD_DIM)


def _pool_and_tables(
    kv_lens: Sequence[int], num_kv_heads: int, page_size: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    pages_of = [-(-kv_len // page_size) for kv_len in kv_lens]
    tables = (
        jnp.asarray(np.random.default_rng(0).permutation(sum(pages_of)), jnp.int32),
        jnp.asarray(np.cumsum([0, *pages_of[:-1]]), jnp.int32),
        jnp.asarray(kv_lens, jnp.int32),
    )
    return _random_pool(sum(pages_of), page_size, num_kv_heads), tables


def _decode(variant: str, kv_lens: Sequence[int], heads: tuple[int, int], page_size: int) -> Repeat:
    pool, tables = _pool_and_tables(kv_lens, heads[1], page_size)

    def attend(pool: jax.Array, q: jax.Array, i: Any) -> jax.Array:
        return decode_attention(q, pool, jnp.int32(i % pool.shape[0]), *tables, implementation=variant)[0]

    return chain(attend, pool, _random(1, len(kv_lens), heads[0], HEAD_DIM))


def _extend(variant: str, num_new: int, num_old: int, heads: tuple[int, int], page_size: int) -> Repeat:
    pool, tables = _pool_and_tables([num_old], heads[1], page_size)
    cu_q_lens = jnp.array([0, num_new], jnp.int32)

    def attend(pool: jax.Array, q: jax.Array, i: Any) -> jax.Array:
        layer = jnp.int32(i % pool.shape[0])
        return extend_attention(q, cu_q_lens, pool, layer, *tables, implementation=variant)[0]

    return chain(attend, pool, _random(1, num_new, heads[0], HEAD_DIM), keeps_queries=True)


def _prefill(variant: str, num_new: int, num_old: int, heads: tuple[int, int]) -> Repeat:
    """The pairs of an extension, over keys that lie in order."""
    k_start = jnp.zeros(num_new, jnp.int32)
    k_end = jnp.full(num_new, num_old, jnp.int32)

    def attend(keys: tuple[jax.Array, jax.Array], q: jax.Array, i: Any) -> jax.Array:
        return prefill_attention(q, *keys, k_start, k_end, implementation=variant)[0]

    keys = _random(2, num_old, heads[1], HEAD_DIM), _random(3, num_old, heads[1], HEAD_DIM)
    return chain(attend, keys, _random(1, num_new, heads[0], HEAD_DIM), keeps_queries=True)


def _update(variant: str, num_tokens: int, num_kv_heads: int) -> Repeat:
    num_pages = -(-num_tokens // UPDATE_PAGE_SIZE) * 4
    pool = _random_pool(num_pages, UPDATE_PAGE_SIZE, num_kv_heads)
    slots = np.random.default_rng(0).permutation(num_pages * UPDATE_PAGE_SIZE)[:num_tokens]
    operands = (
        _random(1, num_tokens, num_kv_heads, HEAD_DIM),
        _random(2, num_tokens, num_kv_heads, HEAD_DIM),
        jnp.asarray(slots, jnp.int32),
    )

    def step(operands: tuple[jax.Array, jax.Array, jax.Array], pool: jax.Array, i: Any) -> jax.Array:
        k, v, slots = operands
        return kv_update(pool, k, v, jnp.int32(i % pool.shape[0]), slots, implementation=variant)

    return repeat_step(step, operands, pool)
