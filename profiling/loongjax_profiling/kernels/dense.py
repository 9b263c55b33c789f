"""Cases of prefill attention: whole prompts, packed ones, and steps of the striped ring."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from loongjax.pallas_kernels import prefill_attention
from loongjax.parallel.striped import stripe_row_starts, visible_ranges
from loongjax_profiling.kernels.case import Case, Repeat
from loongjax_profiling.kernels.paged import HEAD_DIM, chain

LENGTHS = (4096, 16384, 65536, 131072)
HEADS = ((32, 32), (32, 8), (8, 1))
PACKED_HEADS = (32, 8)
RING_LENGTH = 32768
DOPS = (2, 4, 8)

Ranges = tuple[np.ndarray, np.ndarray]


def prefill_cases(variant: str, shrink: int, *, with_cudnn: bool) -> Iterator[Case]:
    """Dense masks beside cuDNN where it runs, then packed ones; `shrink` divides the lengths."""
    for length in LENGTHS:
        num_tokens = max(1, length // shrink)
        for heads in HEADS:
            for is_causal in (True, False):
                work = f"{length // 1024}K {'causal' if is_causal else 'full'}, {heads[0]}/{heads[1]}"
                ranges = causal([num_tokens]) if is_causal else full(num_tokens)
                yield _case(work, variant, ranges, heads)
                if with_cudnn:
                    yield _cudnn_case(work, 1, num_tokens, heads, is_causal)
    long = max(1, 32768 // shrink)
    short = max(1, 1024 // shrink)
    packed = {
        "64 x 1K": [short] * 64,
        "1 x 32K + 32 x 1K": [long] + [short] * 32,
        "Zipf mix": zipf_lengths(2 * long),
    }
    for name, lengths in packed.items():
        yield _case(f"packed {name}, 32/8", variant, causal(lengths), PACKED_HEADS)
    if with_cudnn:
        yield _cudnn_case("packed 64 x 1K, 32/8", 64, short, PACKED_HEADS, True)
    for dop in DOPS:
        ranges = ring_step([dop * max(1, RING_LENGTH // shrink)], dop)
        yield _case(f"ring step of DoP {dop}, {RING_LENGTH // 1024}K a rank, 32/8", variant, ranges, PACKED_HEADS)


def causal(lengths: list[int]) -> Ranges:
    """k_start and k_end within prompts packed one after another."""
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths).astype(np.int32)
    return starts, np.arange(sum(lengths), dtype=np.int32) + 1


def full(num_tokens: int) -> Ranges:
    """All tokens see all."""
    return np.zeros(num_tokens, np.int32), np.full(num_tokens, num_tokens, np.int32)


def ring_step(lengths: list[int], num_ranks: int) -> Ranges:
    """Of prompts packed and striped over `num_ranks`: what rank 0's rows see of rank 1's."""
    starts = stripe_row_starts(lengths, num_ranks)
    k_start, k_end = visible_ranges(jnp.asarray(starts[0]), jnp.int32(0), jnp.int32(1), num_ranks)
    return np.asarray(k_start), np.asarray(k_end)


def zipf_lengths(num_tokens: int, num_prompts: int = 64) -> list[int]:
    """Prompts that fill so many tokens, the i-th longest about 1/i of the longest, in random order; one token each
    where there are no more."""
    num_prompts = min(num_prompts, num_tokens)
    shares = 1 / np.arange(1, num_prompts + 1)
    lengths = 1 + np.floor((num_tokens - num_prompts) * shares / shares.sum()).astype(int)
    lengths[0] += num_tokens - lengths.sum()
    return np.random.default_rng(0).permutation(lengths).tolist()


def num_pairs(ranges: Ranges) -> int:
    """Of queries and keys that they see."""
    return int(np.maximum(ranges[1] - ranges[0], 0).sum(dtype=np.int64))


def _random(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def _case(work: str, variant: str, ranges: Ranges, heads: tuple[int, int]) -> Case:
    num_tokens = len(ranges[0])

    def build() -> Repeat:
        k_start, k_end = map(jnp.asarray, ranges)
        keys = _random(1, num_tokens, heads[1], HEAD_DIM), _random(2, num_tokens, heads[1], HEAD_DIM)

        def attend(keys: Any, q: jax.Array) -> jax.Array:
            k, v = keys
            return prefill_attention(q, k, v, k_start, k_end, implementation=variant)[0]

        return chain(attend, keys, _random(0, num_tokens, heads[0], HEAD_DIM))

    flops = 4.0 * num_pairs(ranges) * heads[0] * HEAD_DIM
    return Case(op="prefill_attention", work=work, variant=variant, amount=flops, unit="FLOP", build=build)


def _cudnn_case(work: str, batch: int, num_tokens: int, heads: tuple[int, int], is_causal: bool) -> Case:
    ranges = causal([num_tokens]) if is_causal else full(num_tokens)

    def build() -> Repeat:
        keys = _random(1, batch, num_tokens, heads[1], HEAD_DIM), _random(2, batch, num_tokens, heads[1], HEAD_DIM)

        def attend(keys: Any, q: jax.Array) -> jax.Array:
            return jax.nn.dot_product_attention(
                q, *keys, is_causal=is_causal, implementation="cudnn", return_residual=True
            )[0]

        return chain(attend, keys, _random(0, batch, num_tokens, heads[0], HEAD_DIM))

    flops = 4.0 * batch * num_pairs(ranges) * heads[0] * HEAD_DIM
    return Case(op="prefill_attention", work=work, variant="cudnn", amount=flops, unit="FLOP", build=build)
