"""Plans: what the scheduler decides. They say who works with whom and how many tokens go where; no device state.

The engine binds a plan to pages and token ids (`loongjax.core.iteration`); only that reaches the devices.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from loongjax.core.cluster import Group, InstanceId


class TokenInterval(NamedTuple):
    """Tokens [begin, end) of one request, kept by one instance."""

    instance: InstanceId
    begin: int
    end: int

    @property
    def num_tokens(self) -> int:
        return self.end - self.begin


class PrefillRequest(NamedTuple):
    """One request of a prefill, and where its keys will stay."""

    request_id: str
    kept: tuple[TokenInterval, ...]
    """In token order and without gaps from 0 to the number of tokens; every boundary but the last is a page multiple.
    Empty if no keys are needed afterwards."""


@dataclasses.dataclass(frozen=True)
class Prefill:
    """Compute the keys of these requests, and a first token each, on the whole group; keep the keys as told."""

    group: Group
    requests: tuple[PrefillRequest, ...]


@dataclasses.dataclass(frozen=True)
class SubBatch:
    """The requests whose next token one master computes, and whose new keys stay with it."""

    master: InstanceId
    request_ids: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Decode:
    """One more token for each of these requests. Every instance with keys of them is in the group."""

    group: Group
    sub_batches: tuple[SubBatch, ...]
    """At least one, with different masters, each in the group."""

    @property
    def masters(self) -> tuple[InstanceId, ...]:
        return tuple(batch.master for batch in self.sub_batches)

    @property
    def request_ids(self) -> tuple[str, ...]:
        return tuple(request_id for batch in self.sub_batches for request_id in batch.request_ids)

    def goes_on_from(self, before: Decode) -> bool:
        """Whether it is that decode again, or what is left of it when some of its requests have left: in the same
        group, each of the others with its master and in its order."""
        if self == before:
            return True
        batches = {batch.master: iter(batch.request_ids) for batch in before.sub_batches}
        # Looking for a request in an iterator takes what comes before it out, so only the same order finds all.
        return self.group == before.group and all(
            request_id in batches.get(batch.master, ())
            for batch in self.sub_batches
            for request_id in batch.request_ids
        )


@dataclasses.dataclass(frozen=True)
class Chunk:
    """The next `num_tokens` of a request's tokens without keys: a piece of its prompt, or its newest token."""

    request_id: str
    num_tokens: int


@dataclasses.dataclass(frozen=True)
class Extend:
    """Compute the keys of these chunks on one instance, which holds all earlier keys of their requests and keeps these.

    A request that is left without tokens to compute gets its next one, so that a decode is a chunk of one token.
    """

    group: Group
    """Of one instance."""
    chunks: tuple[Chunk, ...]
    """At least one, of different requests."""

    @property
    def request_ids(self) -> tuple[str, ...]:
        return tuple(chunk.request_id for chunk in self.chunks)

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)


@dataclasses.dataclass(frozen=True)
class Migrate:
    """Move the last `num_tokens` of the tokens that `source` holds of a request to `target`."""

    request_id: str
    source: InstanceId
    target: InstanceId
    num_tokens: int


@dataclasses.dataclass(frozen=True)
class Preempt:
    """Give up the keys of these requests; they wait again, in front, and are recomputed later."""

    request_ids: tuple[str, ...]


Plan = Prefill | Decode | Extend | Migrate | Preempt
