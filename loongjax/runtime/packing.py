"""From iterations to the padded host arrays of the device programs. Numpy only; every array has the leading dim n."""

from __future__ import annotations

import dataclasses

import numpy as np

from loongjax.core.iteration import DecodeIteration, ExtendIteration, PrefillIteration
from loongjax.core.request import Request
from loongjax.parallel.striped import PADDING_ROW, local_length, stripe
from loongjax.runtime.buckets import Buckets, fit
from loongjax.runtime.programs import DecodeState, ExtendBatch, PrefillBatch


@dataclasses.dataclass(frozen=True)
class PackedPrefill:
    """A prefill as its programs take it."""

    batch: PrefillBatch
    """Numpy arrays."""
    starts: tuple[int, ...]
    """Packed index of each request's first token."""
    sampled: tuple[tuple[int, ...], ...]
    """By rank, the requests for which it samples a token, as indices into the iteration's inputs."""
    positions: np.ndarray
    """int32 [n, B]: of the tokens to be sampled; B is the bucket of the rank that samples most."""


def pack_prefill(iteration: PrefillIteration, buckets: Buckets) -> PackedPrefill:
    """Packs the prompts one behind the other, and stripes them over the group's ranks."""
    n = iteration.group.dop
    inputs = iteration.inputs
    lengths = np.array([len(item.token_ids) for item in inputs])
    ends = np.cumsum(lengths)
    starts = ends - lengths
    num_tokens = int(ends[-1])
    row_starts = np.repeat(starts, lengths).astype(np.int32)
    positions = np.arange(num_tokens, dtype=np.int32) - row_starts
    kept_slots = np.full((num_tokens, n), -1, np.int32)
    for item, start in zip(inputs, starts, strict=True):
        for kept in item.kept:
            kept_slots[start + kept.begin : start + kept.end, iteration.group.rank_of(kept.instance)] = kept.slots

    wanted = [i for i, item in enumerate(inputs) if item.request.max_tokens > 0]
    sampled = tuple(tuple(wanted[rank::n]) for rank in range(n))
    capacity = sample_capacity(n, buckets)
    sample_rows = np.full((n, n * capacity), -1, np.int32)
    sample_positions = np.zeros((n, fit(max(1, len(sampled[0])), buckets.num_rows)), np.int32)
    for rank, indices in enumerate(sampled):
        for row, i in enumerate(indices):
            last = int(ends[i]) - 1
            sample_rows[last % n, rank * capacity + row] = last // n
            sample_positions[rank, row] = lengths[i]

    rows = fit(local_length(num_tokens, n), buckets.num_tokens)
    batch = PrefillBatch(
        token_ids=stripe(np.concatenate([item.token_ids for item in inputs]), n, fill=0, rows=rows),
        positions=stripe(positions, n, fill=0, rows=rows),
        row_starts=stripe(row_starts, n, fill=int(PADDING_ROW), rows=rows),
        kept_slots=np.moveaxis(stripe(kept_slots, n, fill=-1, rows=rows), 2, 0),
        sample_rows=sample_rows,
    )
    return PackedPrefill(batch, tuple(int(start) for start in starts), sampled, sample_positions)


def empty_prefill(n: int, num_tokens: int, buckets: Buckets) -> PrefillBatch:
    """A prefill of nothing but padding."""
    return PrefillBatch(
        token_ids=np.zeros((n, num_tokens), np.int32),
        positions=np.zeros((n, num_tokens), np.int32),
        row_starts=np.full((n, num_tokens), PADDING_ROW, np.int32),
        kept_slots=np.full((n, n, num_tokens), -1, np.int32),
        sample_rows=np.full((n, n * sample_capacity(n, buckets)), -1, np.int32),
    )


def sample_capacity(n: int, buckets: Buckets) -> int:
    """Rows that one rank samples at most: a bucket, as whatever follows takes whole buckets of them."""
    return fit(local_length(buckets.num_rows[-1], n), buckets.num_rows)


def empty_decode(n: int, num_rows: int, buckets: Buckets) -> DecodeState:
    """A decode of nothing but padding."""
    return DecodeState(
        positions=np.zeros((n, num_rows), np.int32),
        kv_lens=np.zeros((n, n * num_rows), np.int32),
        page_starts=np.zeros((n, n * num_rows), np.int32),
        page_indices=np.zeros((n, buckets.num_table_entries), np.int32),
    )


def pack_prompt_targets(iteration: PrefillIteration, packed: PackedPrefill) -> np.ndarray:
    """int32 [n, T]: for rows whose prompt log-probabilities are wanted, the prompt's next token; -1 elsewhere."""
    n, rows = packed.batch.token_ids.shape
    targets = np.full(n * rows, -1, np.int32)
    for item, start in zip(iteration.inputs, packed.starts, strict=True):
        if item.wants_prompt_logprobs:
            prompt = item.token_ids[: len(item.request.prompt_token_ids)]
            targets[start : start + len(prompt) - 1] = prompt[1:]
    return stripe(targets, n, fill=-1)


@dataclasses.dataclass(frozen=True)
class DecodeRows:
    """Whose the rows of a decode are. Those of requests that leave are padding from then on."""

    num_rows: int
    """B, of each rank."""
    by_rank: tuple[dict[int, Request], ...]
    """Each request by its row, in the iteration's order."""

    @classmethod
    def of(cls, iteration: DecodeIteration, buckets: Buckets) -> DecodeRows:
        """Those of a decode that begins."""
        by_rank: list[dict[int, Request]] = [{} for _ in range(iteration.group.dop)]
        for batch in iteration.sub_batches:
            requests = [item.request for item in batch.inputs]
            by_rank[iteration.group.rank_of(batch.master)] = dict(enumerate(requests))
        return cls(fit(max(map(len, by_rank)), buckets.num_rows), tuple(by_rank))

    def left_in(self, iteration: DecodeIteration) -> DecodeRows:
        """Those of a later iteration that goes on from theirs, and so has nobody else: themselves, if nobody left."""
        if sum(len(batch.inputs) for batch in iteration.sub_batches) == sum(map(len, self.by_rank)):
            return self
        names = {item.request.request_id for batch in iteration.sub_batches for item in batch.inputs}
        return DecodeRows(
            self.num_rows,
            tuple(
                [
                    {row: request for row, request in requests.items() if request.request_id in names}
                    for requests in self.by_rank
                ]
            ),
        )


def pack_awaited(iteration: DecodeIteration, rows: DecodeRows) -> dict[tuple[int, int], str]:
    """Request ids by rank and row: whose input tokens the devices hold and the host does not know."""
    awaited: dict[tuple[int, int], str] = {}
    for batch in iteration.sub_batches:
        rank = iteration.group.rank_of(batch.master)
        for row, item in zip(rows.by_rank[rank], batch.inputs, strict=True):
            if item.is_awaited:
                awaited[rank, row] = item.request.request_id
    return awaited


def pack_decode_slots(iteration: DecodeIteration, rows: DecodeRows) -> np.ndarray:
    """int32 [n, B]: where each master keeps its rows' new keys; -1 for padding."""
    slots = np.full((iteration.group.dop, rows.num_rows), -1, np.int32)
    for batch in iteration.sub_batches:
        rank = iteration.group.rank_of(batch.master)
        slots[rank, list(rows.by_rank[rank])] = [item.slot for item in batch.inputs]
    return slots


@dataclasses.dataclass(frozen=True)
class PackedDecode:
    """A decode as its program takes it, from host truth alone."""

    state: DecodeState
    """Numpy arrays: the state before this step."""
    token_ids: np.ndarray
    """int32 [n, B]: the last token of each row that the host knows."""
    num_steps: int
    """Steps, this one included, until a row may outgrow its part of the page table."""


def pack_decode(iteration: DecodeIteration, rows: DecodeRows, buckets: Buckets, page_size: int) -> PackedDecode:
    """Lays the page tables out with room to grow behind every row that gets new keys."""
    n, num_rows = iteration.group.dop, rows.num_rows
    token_ids = np.zeros((n, num_rows), np.int32)
    positions = np.zeros((n, num_rows), np.int32)
    kv_lens = np.zeros((n, n * num_rows), np.int32)
    pages: list[dict[int, np.ndarray]] = [{} for _ in range(n)]
    growing: list[list[int]] = [[] for _ in range(n)]
    for batch in iteration.sub_batches:
        master_rank = iteration.group.rank_of(batch.master)
        for b, item in zip(rows.by_rank[master_rank], batch.inputs, strict=True):
            row = master_rank * num_rows + b
            token_ids[master_rank, b] = _last_token(item.output_token_ids, item.request.prompt_token_ids)
            positions[master_rank, b] = item.position
            for table in item.tables:
                rank = iteration.group.rank_of(table.instance)
                kv_lens[rank, row] = table.num_tokens - (rank == master_rank)
                pages[rank][row] = table.page_indices
            growing[master_rank].append(row)

    page_starts = np.zeros((n, n * num_rows), np.int32)
    page_indices = np.zeros((n, buckets.num_table_entries), np.int32)
    least_slack = buckets.num_table_entries
    for rank in range(n):
        spare = buckets.num_table_entries - sum(len(entries) for entries in pages[rank].values())
        slack = spare // max(1, len(growing[rank]))
        if growing[rank]:
            least_slack = min(least_slack, slack)
        grows = set(growing[rank])
        begin = 0
        for row, entries in pages[rank].items():
            page_starts[rank, row] = begin
            page_indices[rank, begin : begin + len(entries)] = entries
            begin += len(entries) + (slack if row in grows else 0)
    state = DecodeState(positions, kv_lens, page_starts, page_indices)
    return PackedDecode(state, token_ids, 1 + least_slack * page_size)


def _last_token(output: tuple[int, ...], prompt: tuple[int, ...]) -> int:
    return output[-1] if output else prompt[-1]


@dataclasses.dataclass(frozen=True)
class PackedExtend:
    """An extend as its programs take it."""

    batch: ExtendBatch
    """Numpy arrays."""
    sampled: tuple[int, ...]
    """The requests whose next token is sampled, as indices into the iteration's inputs."""
    positions: np.ndarray
    """int32 [1, B]: of the tokens to be sampled."""
    awaited: dict[tuple[int, int], str]
    """Request ids by rank and packed row: whose input tokens the devices hold and the host does not know."""


def pack_extend(iteration: ExtendIteration, buckets: Buckets) -> PackedExtend:
    """Packs the chunks one behind the other, and their requests' page tables likewise."""
    inputs = iteration.inputs
    ends = np.cumsum([len(item.token_ids) for item in inputs])
    num_tokens = int(ends[-1])
    batch = empty_extend(fit(num_tokens, buckets.num_tokens), fit(len(inputs), buckets.num_rows), buckets)
    batch.token_ids[0, :num_tokens] = np.concatenate([item.token_ids for item in inputs])
    batch.slots[0, :num_tokens] = np.concatenate([item.slots for item in inputs])
    batch.cu_q_lens[0, 1:] = num_tokens
    batch.cu_q_lens[0, 1 : len(inputs) + 1] = ends
    first_entry = 0
    for row, (item, end) in enumerate(zip(inputs, ends.tolist(), strict=True)):
        start = end - len(item.token_ids)
        batch.positions[0, start:end] = np.arange(item.position, item.position + end - start)
        batch.row_starts[0, start:end] = start
        batch.kv_lens[0, row] = item.position
        batch.page_starts[0, row] = first_entry
        entries = item.table.page_indices
        batch.page_indices[0, first_entry : first_entry + len(entries)] = entries
        first_entry += len(entries)
    sampled = tuple(row for row, item in enumerate(inputs) if item.is_sampled)
    positions = np.zeros((1, fit(max(1, len(sampled)), buckets.num_rows)), np.int32)
    for place, row in enumerate(sampled):
        batch.sample_rows[0, place] = ends[row] - 1
        positions[0, place] = inputs[row].position + len(inputs[row].token_ids)
    awaited = {
        (0, end - 1): item.request.request_id
        for item, end in zip(inputs, ends.tolist(), strict=True)
        if item.is_awaited
    }
    return PackedExtend(batch, sampled, positions, awaited)


def empty_extend(num_tokens: int, num_rows: int, buckets: Buckets) -> ExtendBatch:
    """An extend of nothing but padding."""
    return ExtendBatch(
        token_ids=np.zeros((1, num_tokens), np.int32),
        positions=np.zeros((1, num_tokens), np.int32),
        row_starts=np.full((1, num_tokens), PADDING_ROW, np.int32),
        slots=np.full((1, num_tokens), -1, np.int32),
        cu_q_lens=np.zeros((1, num_rows + 1), np.int32),
        kv_lens=np.zeros((1, num_rows), np.int32),
        page_starts=np.zeros((1, num_rows), np.int32),
        page_indices=np.zeros((1, buckets.num_table_entries), np.int32),
        sample_rows=np.full((1, sample_capacity(1, buckets)), -1, np.int32),
    )
