"""Cases of prefill attention: whole prompts, packed ones, and steps of the striped ring."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from loongjax.pallas_kernels import prefill_attention
from loongjax.parallel.striped import stripe_row_starts, visible_ranges
from loongjax_profiling.kernels.case import Case, Repeat
from loongjax_profiling.kernels.chain import chain
from loongjax_profiling.kernels.paged import HEAD_DIM
from loongjax_profiling.kernels.rivals import Rival

LENGTHS = (4096, 16384, 65536, 131072)
HEADS = ((32, 32), (32, 8), (8, 1))
MIX_HEADS = (32, 8)
MIX_SHARE = 0.9
"""Of the causal rate: of rivals' on 64 prompts of 1K as a batch, else of our own over as many tokens."""
RING_LENGTH = 16384
DOPS = (2, 4, 8)

Ranges = tuple[np.ndarray, np.ndarray]


def prefill_cases(variant: str, shrink: int, rivals: Mapping[str, Rival]) -> Iterator[Case]:
    """Dense masks beside rivals, then mixes; `shrink` divides the lengths, and there are targets if it is 1."""
    has_targets = shrink == 1
    for length in LENGTHS:
        num_tokens = max(1, length // shrink)
        for heads in HEADS:
            for is_causal in (True, False):
                work = f"{length // 1024}K {'causal' if is_causal else 'full'}, {heads[0]}/{heads[1]}"
                ranges = causal([num_tokens]) if is_causal else full(num_tokens)
                case = _case(work, variant, ranges, heads)
                yield dataclasses.replace(case, least_share=1.0 if has_targets else None)
                for name, rival in rivals.items():
                    yield _rival_case(work, name, rival, 1, num_tokens, heads, is_causal)
    short, long, ring = (max(1, length // shrink) for length in (1024, 32768, RING_LENGTH))
    heads = f"{MIX_HEADS[0]}/{MIX_HEADS[1]}"
    mixes = {
        "packed 64 x 1K": (causal([short] * 64), 65536),
        "packed 1 x 32K + 32 x 1K": (causal([long] + [short] * 32), 65536),
        "packed Zipf mix of 64K": (causal(zipf_lengths(2 * long)), 65536),
        **{f"ring step of DoP {dop}, 16K a rank": (ring_step([dop * ring], dop), RING_LENGTH) for dop in DOPS},
        "ring step of DoP 4, Zipf mix, 16K a rank": (ring_step(zipf_lengths(4 * ring), 4), RING_LENGTH),
    }
    for name, (ranges, length) in mixes.items():
        case = _case(f"{name}, {heads}", variant, ranges, MIX_HEADS)
        baseline = (f"{length // 1024}K causal, {heads}", variant)
        yield dataclasses.replace(case, baseline=baseline, least_share=MIX_SHARE if has_targets else None)
    for name, rival in rivals.items():
        yield _rival_case(f"packed 64 x 1K, {heads}", name, rival, 64, short, MIX_HEADS, True)


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

        def attend(keys: Any, q: jax.Array, i: Any) -> jax.Array:
            k, v = keys
            return prefill_attention(q, k, v, k_start, k_end, implementation=variant)[0]

        keys = _random(1, num_tokens, heads[1], HEAD_DIM), _random(2, num_tokens, heads[1], HEAD_DIM)
        return chain(attend, keys, _random(0, num_tokens, heads[0], HEAD_DIM), keeps_queries=True)

    flops = 4.0 * num_pairs(ranges) * heads[0] * HEAD_DIM
    return Case(op="prefill_attention", work=work, variant=variant, amount=flops, unit="FLOP", build=build)


def _rival_case(
    work: str, name: str, rival: Rival, batch_size: int, num_tokens: int, heads: tuple[int, int], is_causal: bool
) -> Case:
    ranges = causal([num_tokens]) if is_causal else full(num_tokens)

    def build() -> Repeat:
        def attend(keys: Any, q: jax.Array, i: Any) -> jax.Array:
            k, v = keys
            return rival(q, k, v, is_causal=is_causal)[0]

        shape = (batch_size, num_tokens)
        keys = _random(1, *shape, heads[1], HEAD_DIM), _random(2, *shape, heads[1], HEAD_DIM)
        return chain(attend, keys, _random(0, *shape, heads[0], HEAD_DIM), keeps_queries=True)

    flops = 4.0 * batch_size * num_pairs(ranges) * heads[0] * HEAD_DIM
    case = Case(op="prefill_attention", work=work, variant=name, amount=flops, unit="FLOP", build=build)
    return dataclasses.replace(case, is_rival=True)
