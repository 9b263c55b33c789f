"""Iterations: plans bound to pages and tokens. They carry everything a runtime needs, so any host could execute one.

Host index arrays are int32 numpy arrays; whoever receives one must not write to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from loongjax.core.cluster import Group, InstanceId
from loongjax.core.request import Request, TokenLogprobs


@dataclasses.dataclass(frozen=True)
class KeptTokens:
    """Tokens [begin, end) of a request, and the slots of the instance's pool that will hold them."""

    instance: InstanceId
    begin: int
    end: int
    slots: np.ndarray
    """int32 [end - begin]; slot = page * page_size + offset."""


@dataclasses.dataclass(frozen=True)
class PrefillInput:
    """One request of a prefill."""

    request: Request
    token_ids: np.ndarray
    """int32 [T]: the prompt, and after a preemption the tokens generated before it."""
    kept: tuple[KeptTokens, ...]
    wants_prompt_logprobs: bool
    """Whether the prompt's log-probabilities are still to be computed."""


@dataclasses.dataclass(frozen=True)
class PrefillIteration:
    """Prefill a packed batch on a group, and sample one token a request (none where `max_tokens` is 0)."""

    iteration_id: int
    group: Group
    inputs: tuple[PrefillInput, ...]


@dataclasses.dataclass(frozen=True)
class InstanceTable:
    """The pages of one instance that hold keys of one request."""

    instance: InstanceId
    page_indices: np.ndarray
    """int32 [ceil(num_tokens / page_size)], filled densely in this order."""
    num_tokens: int


@dataclasses.dataclass(frozen=True)
class DecodeInput:
    """One request of a decode: its input token, and where its keys are once this token's are written."""

    request: Request
    output_token_ids: tuple[int, ...]
    """Every token generated so far that the host knows; empty if the iteration continues, since the devices hold what
    they need of them."""
    position: int
    """Of the input token, from 0: the number of tokens whose keys were written before this step."""
    slot: int
    """Where the master writes the input token's keys."""
    tables: tuple[InstanceTable, ...]
    """Every instance that holds keys, this step's included; the master's last token is the one at `slot`."""
    is_awaited: bool = False
    """Whether the input token is what the iteration right before samples, on the same group: the devices hold it, and
    the host does not know it yet. Otherwise it is the last of the output, or of the prompt if there is none. A decode
    that continues awaits none."""


@dataclasses.dataclass(frozen=True)
class DecodeSubBatch:
    """What one master computes."""

    master: InstanceId
    inputs: tuple[DecodeInput, ...]


@dataclasses.dataclass(frozen=True)
class DecodeIteration:
    """One token for each request of each sub-batch."""

    iteration_id: int
    group: Group
    sub_batches: tuple[DecodeSubBatch, ...]
    continues: bool
    """Whether the previous iteration of this group had these requests, each with its master and in this order, one
    token earlier, and nothing else happened to its instances' part of them since: what the devices hold of them is then
    right. Others that it had have left."""


@dataclasses.dataclass(frozen=True)
class ExtendInput:
    """One request of an extend: a chunk of its tokens, and where its keys are once the chunk's are written."""

    request: Request
    token_ids: np.ndarray
    """int32 [T]: the chunk; 0 for a token that is awaited."""
    position: int
    """Of the chunk's first token, from 0: the number of tokens whose keys were written before."""
    slots: np.ndarray
    """int32 [T]: where the chunk's keys are written."""
    table: InstanceTable
    """All the request's pages, the chunk's included."""
    output_token_ids: tuple[int, ...]
    """Every token generated so far that the host knows."""
    is_sampled: bool
    """Whether the chunk ends with the request's last token, so that the next one is sampled."""
    is_awaited: bool = False
    """Whether the chunk's last token is: see `DecodeInput.is_awaited`."""


@dataclasses.dataclass(frozen=True)
class ExtendIteration:
    """The keys of these chunks, and one token for each request whose last token is in its chunk."""

    iteration_id: int
    group: Group
    """Of one instance."""
    inputs: tuple[ExtendInput, ...]


@dataclasses.dataclass(frozen=True)
class MigrateIteration:
    """Copy keys and values from slots of one instance to slots of another."""

    iteration_id: int
    source: InstanceId
    target: InstanceId
    source_slots: np.ndarray
    """int32 [T]"""
    target_slots: np.ndarray
    """int32 [T]"""

    @property
    def group(self) -> Group:
        return Group.of((self.source, self.target))


@dataclasses.dataclass(frozen=True)
class RecoverIteration:
    """Follows every failure on its group: empties the instances' part of the pool, and has them compute something tiny.

    It needs no request, so its outcome says whether the devices work. Until it has completed nothing else is submitted
    to its instances.
    """

    iteration_id: int
    group: Group


Iteration = PrefillIteration | DecodeIteration | ExtendIteration | MigrateIteration | RecoverIteration


@dataclasses.dataclass(frozen=True)
class SampledToken:
    """What one request got from an iteration."""

    request_id: str
    token_id: int
    """-1 where nothing was to be sampled."""
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: Sequence[TokenLogprobs] | None = None
    """One for every prompt token but the first."""


@dataclasses.dataclass(frozen=True)
class Completion:
    """An iteration is over, or the first steps of one."""

    iteration_id: int
    tokens: tuple[SampledToken, ...] = ()
    """One for each request of a prefill or a decode; of an extend, for those to be sampled."""
    elapsed_s: float = 0.0
    """From submission to the result on the host, in seconds."""
    error: str | None = None
    """Why it failed. The keys that its group held are then lost, and its instances do nothing until they recover."""
    steps_s: tuple[float, ...] = ()
    """From a `JumpingRuntime`: how long each step of a decode took; this stands for all, with `tokens` in each."""
    is_over: bool = True
    """Whether the iteration is over; False if a `JumpingRuntime` tells what it has done so far."""

    @property
    def num_steps(self) -> int:
        return max(1, len(self.steps_s))
