"""The sampler again, row by row in numpy and float64, from its definition."""

from __future__ import annotations

import collections
import math
from typing import Any

import numpy as np

from loongjax.core.request import Request
from loongjax.core.sampling import SamplingParams
from loongjax.runtime.sampling import SamplerInput


def make_input(*, prompt=(1, 2, 3), output=(), seed=0, stop_ids=(), request_id="r", **params: Any) -> SamplerInput:
    sampling = SamplingParams(max_tokens=None, **params)
    request = Request(
        request_id=request_id,
        prompt_token_ids=tuple(prompt),
        sampling=sampling,
        max_tokens=1000,
        seed=seed,
        stop_token_ids=frozenset(stop_ids),
    )
    return SamplerInput(request, tuple(output))


def position_of(item: SamplerInput) -> int:
    """Of the token that is sampled next."""
    return len(item.request.prompt_token_ids) + len(item.output_token_ids)


def threefry2x32(key: tuple[int, int], counter: tuple[int, int]) -> tuple[int, int]:
    """Salmon et al. 2011, Threefry-2x32 with 20 rounds, on Python integers."""
    mask = 0xFFFFFFFF
    schedule = (key[0], key[1], key[0] ^ key[1] ^ 0x1BD11BDA)
    x0, x1 = (counter[0] + schedule[0]) & mask, (counter[1] + schedule[1]) & mask
    rotations = ((13, 15, 26, 6), (17, 29, 16, 24))
    for group in range(5):
        for rotation in rotations[group % 2]:
            x0 = (x0 + x1) & mask
            x1 = ((x1 << rotation) | (x1 >> (32 - rotation))) & mask
            x1 ^= x0
        x0 = (x0 + schedule[(group + 1) % 3]) & mask
        x1 = (x1 + schedule[(group + 2) % 3] + group + 1) & mask
    return x0, x1


def gumbel(seed: int, position: int, vocab_size: int) -> np.ndarray:
    words = ((seed >> 32) & 0xFFFFFFFF, seed & 0xFFFFFFFF)
    row_key = threefry2x32(words, (0, position))
    uniform = np.array([threefry2x32(row_key, (0, token_id))[0] for token_id in range(vocab_size)]) / 2.0**32
    return -np.log(-np.log1p(-np.clip(uniform, 2.0**-33, 1 - 2.0**-24)))


def edited_logits(logits: np.ndarray, item: SamplerInput) -> np.ndarray:
    """After logit_bias, min_tokens and penalties; from the full history."""
    params, edited = item.request.sampling, logits.astype(np.float64)
    for token_id, bias in params.logit_bias.items():
        if token_id < len(edited):
            edited[token_id] += bias
    if len(item.output_token_ids) < params.min_tokens:
        edited[sorted(item.request.stop_token_ids)] = -np.inf
    counts = collections.Counter(item.output_token_ids)
    for token_id in {*item.request.prompt_token_ids, *counts}:
        factor = params.repetition_penalty
        edited[token_id] = edited[token_id] / factor if edited[token_id] > 0 else edited[token_id] * factor
    for token_id, count in counts.items():
        edited[token_id] -= params.frequency_penalty * count + params.presence_penalty
    return edited


def kept(tempered: np.ndarray, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """Which tokens the filters keep: a sort, a cumulative sum and a comparison."""
    with np.errstate(under="ignore"):
        weights = np.exp(tempered.astype(np.float64) - tempered.max())
    order = np.argsort(-tempered, kind="stable")
    if top_k > 0:
        order = order[:top_k]
    if top_p < 1.0:
        before = np.concatenate([[0.0], np.cumsum(weights[order])[:-1]]) / weights[order].sum()
        order = order[(before < top_p) | (np.arange(len(order)) == 0)]
    mask = np.zeros(len(tempered), bool)
    mask[order] = True
    return mask & (weights >= min_p)


def plausible_tokens(logits: np.ndarray, item: SamplerInput) -> set[int]:
    """The tokens that may be sampled: one, or more where two are within rounding of each other."""
    params, edited = item.request.sampling, edited_logits(logits, item)
    if params.temperature == 0.0:
        return set(np.flatnonzero(edited >= edited.max() - 1e-5).tolist())
    with np.errstate(over="ignore"):
        tempered = (edited - edited.max()) / params.temperature
    noisy = tempered + gumbel(item.request.seed, position_of(item), len(logits))
    tokens = set()
    for slack in (-1e-5, 1e-5):
        top_p = params.top_p if params.top_p == 1.0 else min(max(params.top_p + slack, 1e-9), 1 - 1e-9)
        mask = kept(tempered, params.top_k, top_p, params.min_p * (1 - slack))
        candidates = np.where(mask, noisy, -np.inf)
        tokens |= set(np.flatnonzero(candidates >= candidates.max() - 1e-4).tolist())
    return tokens


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max()
    return shifted - math.log(np.exp(shifted).sum())


def order_of(logits: np.ndarray) -> np.ndarray:
    """Token ids, highest logit first, equal ones by id."""
    return np.argsort(-logits, kind="stable")
