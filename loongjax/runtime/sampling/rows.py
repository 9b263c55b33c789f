"""What the sampler knows of each row of a batch: built on the host, data on the devices.

Every array has a leading dimension n, one entry for each rank of the "sp" axis, then the rows of that rank's sub-batch,
padded to B. Padding rows are greedy and edit nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from loongjax.core.request import Request
from loongjax.runtime.sampling.variant import SamplerInput, SamplerVariant, choose_variant, masks_stop_tokens

Leaf = np.ndarray | jax.Array

FOREVER = np.iinfo(np.int32).max
"""A position that no token reaches."""

UNLIMITED = np.iinfo(np.int32).max
"""The top_k that keeps every token."""

EDITS_PER_ROW = (16, 512)
"""Edit capacities that are compiled for a batch of B rows, in multiples of B. A batch with more takes the
last times a power of four, and an executable of its own."""


class NoiseRows(NamedTuple):
    """How random each row is."""

    temperature: Leaf
    """float32 [n, B]; 0 is greedy."""
    seed: Leaf
    """uint32 [n, B, 2], the high word first."""


class FilterRows(NamedTuple):
    """Which tokens each row may sample, by probability."""

    top_k: Leaf
    """int32 [n, B]; UNLIMITED keeps all."""
    top_p: Leaf
    """float32 [n, B]; 1 keeps all."""
    min_p: Leaf
    """float32 [n, B]; 0 keeps all."""


class LogitEdits(NamedTuple):
    """Values to add to single logits: a flat list over the rows of a rank, padded to its capacity E."""

    row: Leaf
    """int32 [n, E]; B where there is no edit."""
    token_id: Leaf
    """int32 [n, E]; ids beyond the vocabulary are ignored."""
    value: Leaf
    """float32 [n, E]; -inf bans the token."""
    until: Leaf
    """int32 [n, E]: the edit applies to tokens at positions before this one."""


class PenaltyRows(NamedTuple):
    """How each row discourages tokens that it has seen."""

    presence: Leaf
    """float32 [n, B]; 0 for none."""
    frequency: Leaf
    """float32 [n, B]; 0 for none."""
    repetition: Leaf
    """float32 [n, B]; 1 for none."""


class SamplerRows(NamedTuple):
    """The rows of a batch. Groups that the variant does not hold are None."""

    noise: NoiseRows | None = None
    filters: FilterRows | None = None
    edits: LogitEdits | None = None
    penalties: PenaltyRows | None = None


def build_rows(
    sub_batches: Sequence[Sequence[SamplerInput]], batch_size: int, variant: SamplerVariant | None = None
) -> tuple[SamplerVariant, SamplerRows]:
    """The variant and the rows of a batch, as numpy arrays.

    They stay right from step to step while nobody joins: what changes with the position is masked by it.

    Args:
        sub_batches: the requests of each "sp" rank, in rank order; empty for ranks that are no masters.
        batch_size: B, the bucket; at least the longest sub-batch.
        variant: one that covers every request; None: the cheapest of `TIERS`.
    """
    assert all(len(inputs) <= batch_size for inputs in sub_batches), batch_size
    if variant is None:
        variant = choose_variant(item for inputs in sub_batches for item in inputs)
    shape = (len(sub_batches), batch_size)
    rows = SamplerRows(
        noise=_noise_rows(sub_batches, shape) if variant.has_noise else None,
        filters=_filter_rows(sub_batches, shape) if variant.has_filters else None,
        edits=_logit_edits(sub_batches, batch_size) if variant.has_edits else None,
        penalties=_penalty_rows(sub_batches, shape) if variant.has_penalties else None,
    )
    return variant, rows


def _noise_rows(sub_batches: Sequence[Sequence[SamplerInput]], shape: tuple[int, int]) -> NoiseRows:
    limits = np.finfo(np.float32)
    least, most = float(limits.tiny), float(limits.max)
    rows = NoiseRows(temperature=np.zeros(shape, np.float32), seed=np.zeros((*shape, 2), np.uint32))
    for rank, row, request in _requests(sub_batches):
        # Below the smallest normal float a device may flush to zero, and above the largest -inf / inf is NaN.
        temperature = request.sampling.temperature
        rows.temperature[rank, row] = min(temperature, most) if temperature >= least else 0.0
        rows.seed[rank, row] = (request.seed >> 32) & 0xFFFFFFFF, request.seed & 0xFFFFFFFF
    return rows


def _filter_rows(sub_batches: Sequence[Sequence[SamplerInput]], shape: tuple[int, int]) -> FilterRows:
    rows = FilterRows(
        top_k=np.full(shape, UNLIMITED, np.int32), top_p=np.ones(shape, np.float32), min_p=np.zeros(shape, np.float32)
    )
    for rank, row, request in _requests(sub_batches):
        params = request.sampling
        rows.top_k[rank, row] = min(params.top_k, UNLIMITED) or UNLIMITED
        rows.top_p[rank, row] = params.top_p
        rows.min_p[rank, row] = params.min_p
    return rows


def _penalty_rows(sub_batches: Sequence[Sequence[SamplerInput]], shape: tuple[int, int]) -> PenaltyRows:
    rows = PenaltyRows(
        presence=np.zeros(shape, np.float32),
        frequency=np.zeros(shape, np.float32),
        repetition=np.ones(shape, np.float32),
    )
    for rank, row, request in _requests(sub_batches):
        params = request.sampling
        rows.presence[rank, row] = params.presence_penalty
        rows.frequency[rank, row] = params.frequency_penalty
        # Beyond these a penalised logit would leave float32, and 0 * -inf is NaN.
        rows.repetition[rank, row] = min(max(params.repetition_penalty, 1e-30), 1e30)
    return rows


def _logit_edits(sub_batches: Sequence[Sequence[SamplerInput]], batch_size: int) -> LogitEdits:
    per_rank = [[edit for row, item in enumerate(inputs) for edit in _edits_of(row, item)] for inputs in sub_batches]
    capacity = edit_capacity(max(map(len, per_rank), default=0), batch_size)
    shape = (len(sub_batches), capacity)
    edits = LogitEdits(
        row=np.full(shape, batch_size, np.int32),
        token_id=np.zeros(shape, np.int32),
        value=np.zeros(shape, np.float32),
        until=np.zeros(shape, np.int32),
    )
    for rank, flat in enumerate(per_rank):
        for column, values in zip(edits, zip(*flat, strict=True), strict=False):
            column[rank, : len(flat)] = values
    return edits


def edit_capacity(num_edits: int, batch_size: int) -> int:
    """The smallest capacity that holds `num_edits` edits on one rank."""
    capacities = [per_row * batch_size for per_row in EDITS_PER_ROW]
    while capacities[-1] < num_edits:
        capacities.append(4 * capacities[-1])
    return next(capacity for capacity in capacities if capacity >= num_edits)


def _edits_of(row: int, item: SamplerInput) -> list[tuple[int, int, float, int]]:
    """(row, token id, value, until) of one request. Ids that int32 cannot hold are in no vocabulary."""
    request = item.request
    edits = [(row, token_id, bias, FOREVER) for token_id, bias in request.sampling.logit_bias.items()]
    if masks_stop_tokens(item):
        until = min(len(request.prompt_token_ids) + request.sampling.min_tokens, FOREVER)
        edits += [(row, token_id, -np.inf, until) for token_id in sorted(request.stop_token_ids)]
    return [edit for edit in edits if edit[1] < FOREVER]


def _requests(sub_batches: Sequence[Sequence[SamplerInput]]) -> Iterator[tuple[int, int, Request]]:
    for rank, inputs in enumerate(sub_batches):
        for row, item in enumerate(inputs):
            yield rank, row, item.request
