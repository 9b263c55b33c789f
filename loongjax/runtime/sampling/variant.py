"""Which optional machinery a compiled sampler holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from loongjax.core.request import Request


class SamplerInput(NamedTuple):
    """One request whose next token is to be sampled."""

    request: Request
    output_token_ids: Sequence[int]
    """What it has generated so far, as far as the host knows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerVariant:
    """The static part of a sampler: two batches of one variant and one bucket share an executable."""

    name: str
    has_noise: bool = False
    """Temperature and Gumbel noise; without it every row is greedy."""
    has_filters: bool = False
    """top_k, top_p, min_p."""
    has_edits: bool = False
    """logit_bias, and stop tokens masked until min_tokens."""
    has_logprobs: bool = False
    """Log-probability and rank of the sampled token, and the most probable ones."""
    has_penalties: bool = False
    """Presence, frequency and repetition penalties, and the token counts they need."""

    def covers(self, other: SamplerVariant) -> bool:
        """Whether every mechanism of `other` is compiled into this one."""
        return all(
            getattr(self, field.name) or not getattr(other, field.name)
            for field in dataclasses.fields(self)
            if field.name.startswith("has_")
        )


GREEDY = SamplerVariant(name="greedy")
SAMPLED = SamplerVariant(name="sampled", has_noise=True)
FILTERED = SamplerVariant(name="filtered", has_noise=True, has_filters=True)
SCORED = SamplerVariant(name="scored", has_noise=True, has_filters=True, has_edits=True, has_logprobs=True)
FULL = SamplerVariant(
    name="full", has_noise=True, has_filters=True, has_edits=True, has_logprobs=True, has_penalties=True
)

TIERS = (GREEDY, SAMPLED, FILTERED, SCORED, FULL)
"""The variants that are compiled, cheapest first, each covering the one before.

Five mechanisms make 32 combinations, each an executable for every bucket and mesh size; a chain makes five. GREEDY
is one pass over the logits; SAMPLED adds the noise, FILTERED some forty passes that write nothing. SCORED adds what is
rarer but keeps no state; FULL alone holds token counts on the devices, five bytes a logit.
"""


def choose_variant(inputs: Iterable[SamplerInput]) -> SamplerVariant:
    """The cheapest of `TIERS` that serves every one of these requests."""
    inputs = tuple(inputs)
    parameters = [item.request.sampling for item in inputs]
    sampled = [params for params in parameters if not params.is_greedy]
    needed = SamplerVariant(
        name="needed",
        has_noise=bool(sampled),
        has_filters=any(params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0 for params in sampled),
        has_edits=any(item.request.sampling.logit_bias or masks_stop_tokens(item) for item in inputs),
        has_logprobs=any(params.logprobs is not None for params in parameters),
        has_penalties=any(params.has_penalties for params in parameters),
    )
    return next(tier for tier in TIERS if tier.covers(needed))


def masks_stop_tokens(item: SamplerInput) -> bool:
    """Whether min_tokens still keeps this request from sampling its stop tokens."""
    request = item.request
    return bool(request.stop_token_ids) and len(item.output_token_ids) < request.sampling.min_tokens
