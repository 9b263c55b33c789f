"""Which waiting requests are prefilled together, and on how many instances: equation 5 of the paper, exactly."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from loongjax.scheduler.esp.run_times import Block, PrefillSeconds, Runs, Workspace, runs_of


class Batch(NamedTuple):
    """One prefill: places in the lists of requests and of instances that were split."""

    requests: range
    instances: range


class Question(NamedTuple):
    """What is to be split."""

    loads: Float[np.ndarray, "4 requests"]
    """Of each request the tokens to compute, descending, their square, what a second of its prefill costs, above 0, and
    the slots that its keys take."""
    free_tokens: Sequence[int]
    """Free slots of each instance. If they descend, no instance between two batches is worth leaving out; the last ones
    may be."""
    seconds: PrefillSeconds
    """Asked about every batch of neighbours, a block of them at a time. Equal ones must give equal times."""
    max_tokens_per_instance: int
    """A batch on d instances computes at most d times as many."""
    max_requests: int
    """Of one batch."""


class Splits:
    """The cheapest splits of requests, and of the first 1, 2, ... of a list of instances, into batches.

    Each batch takes neighbours of both lists. f[i][k], the least cost of the first i requests on exactly the first k
    instances, is the least over j < i and l < k of f[j][l] + T(R[j, i], E[l, k]) where D[j, i] <= V[l, k]; the answer
    is the least f[n][k] over k. T is a batch's time times the sum of its weights; with 1 / length as weights, the sum
    of normalised input latencies. Nothing is pruned: the bounds of equation 6 lose the optimum where memory is short,
    and with them the reference never forms a second batch.

    Only neighbours are put together, which is the paper's restriction. Against all partitions into sets, for 5
    requests of 50 to 50,000 tokens on 2 or 3 instances, that lost nothing where memory was ample, under 1 % where
    weights were off 1 / length by up to 4 times, and with 1.2 times the memory needed 3 to 5 %, at worst 2.4 times.
    Where memory is shorter still, there may be a partition into sets and none into neighbours.

    Args:
        question: what is to be split.
        workspace: memory of earlier searches, whose answers must have been asked for before; None: new memory.
    """

    def __init__(self, question: Question, workspace: Workspace | None = None) -> None:
        self._question = question
        self._workspace = Workspace() if workspace is None else workspace
        self._found: dict[int, tuple[Batch, ...] | None] = {}
        """Answers, by the number of instances."""

    @functools.cached_property
    def is_memory_short(self) -> bool:
        """Whether there may be a batch that some instance could not hold. If not, any instances are as good."""
        return self._is_short(self._question.free_tokens)

    def _is_short(self, free_tokens: Sequence[int]) -> bool:
        return self._num_slots > min(free_tokens, default=0)

    @functools.cached_property
    def _num_slots(self) -> float:
        """That the keys of all requests take."""
        return sum(self._question.loads[3].tolist())

    def answer(self, question: Question) -> bool:
        """Whether those of this question would be the same, because memory is ample for both, so that how much there is
        does not matter.
        """
        loads, free_tokens, *rest = question
        own_loads, own_free_tokens, *own_rest = self._question
        return (
            len(own_free_tokens) == len(free_tokens)
            and own_rest == rest
            and (own_loads is loads or own_loads.tobytes() == loads.tobytes())
            and not (self.is_memory_short or self._is_short(free_tokens))
        )

    def on_first(self, num_instances: int) -> tuple[Batch, ...] | None:
        """Batches in the order of the lists, which cover all requests and no more than so many instances; None if
        memory or limits allow no split.
        """
        if num_instances not in self._found:
            self._found[num_instances] = self._find(num_instances)
        return self._found[num_instances]

    def least_cost(self, num_instances: int) -> float:
        """What those on no more than so many instances cost, fewer than all; inf if there are none."""
        return min(self._table.least[:num_instances, -1].tolist(), default=math.inf)

    def _find(self, num_instances: int) -> tuple[Batch, ...] | None:
        num_requests = self._question.loads.shape[1]
        if num_requests == 0:
            return ()
        if num_instances == 0:
            return None
        if num_instances == 1:
            num_tokens, _, _, num_slots = self._question.loads.sum(axis=1)
            fits = (
                num_slots <= self._question.free_tokens[0]
                and num_tokens <= self._question.max_tokens_per_instance
                and num_requests <= self._question.max_requests
            )
            return (Batch(range(num_requests), range(1)),) if fits else None
        return self._table.trace_back(num_instances)

    @functools.cached_property
    def _table(self) -> _Table:
        loads, free_tokens, seconds, max_tokens_per_instance, max_requests = self._question
        runs = runs_of(loads.shape[1], max_requests)
        times = self._workspace.times_of(runs, loads[:2], seconds, len(free_tokens))
        table = _Table(runs, loads, free_tokens, self._workspace, is_memory_short=self.is_memory_short)
        for block in runs.blocks:
            table.price(block, times.of(block), max_tokens_per_instance)
            table.fill(block)
        return table


class SplitMemory:
    """The last search of a policy, and its memory.

    While requests wait for instances that are held for them, each step that ends elsewhere leads to the same split, and
    so does each rehearsal of one.
    """

    def __init__(self) -> None:
        self._workspace = Workspace()
        self._last: Splits | None = None

    def splits(self, question: Question) -> Splits:
        """Those of a question, until others are asked for."""
        if self._last is None or not self._last.answer(question):
            self._last = Splits(question, self._workspace)
        return self._last


class _Table:
    """The table of f, filled from its first requests on.

    Args:
        runs: what may be a batch.
        loads: see `Question`.
        free_tokens: slots of each instance.
        workspace: for what is known of every run.
        is_memory_short: see `Splits`.
    """

    def __init__(
        self,
        runs: Runs,
        loads: Float[np.ndarray, "4 requests"],
        free_tokens: Sequence[int],
        workspace: Workspace,
        *,
        is_memory_short: bool,
    ) -> None:
        self._runs = runs
        self._workspace = workspace
        self._loads = loads
        self._upto = loads.cumsum(axis=1)
        """Sums up to each request."""
        self._costs = workspace.array("costs", len(free_tokens), runs.num_runs)
        """T of each run as a batch on 1, 2, ... instances."""
        self._free_tokens = free_tokens
        self._is_memory_short = is_memory_short
        self.least = np.empty((len(free_tokens), loads.shape[1] + 1))
        """[k - 1, i]: f[i][k]; of the last k, what the first i requests cost as one batch."""
        self.least.fill(np.inf)

    def price(self, block: Block, times: Float[np.ndarray, "dops block_runs"], max_tokens_per_instance: int) -> None:
        """Finds the costs of a block's runs, which take so long, infinite where instances cannot compute as much, and
        what the first requests cost as one batch.
        """
        costs = self._costs[:, block.part]
        np.multiply(times[: len(costs)], self._sums(2, block), out=costs)
        if self._upto[0, -1] > max_tokens_per_instance:
            limits = np.arange(1, len(costs) + 1) * max_tokens_per_instance
            costs[self._sums(0, block) > limits[:, None]] = np.inf
        alone = costs.take(block.offsets[block.prefixes], axis=1)
        begin, end = block.requests.start, block.requests.start + alone.shape[1]
        if self._is_memory_short:
            alone[self._upto[3, begin:end] > self._free[:, None]] = np.inf
        self.least[:, begin + 1 : end + 1] = alone

    def fill(self, block: Block) -> None:
        """Finds the entries of a block's requests; those before are known. Of the last k, only one is asked for."""
        entries = slice(block.requests.start + 1, block.requests.stop + 1)
        num_instances, num_runs = len(self._costs), len(block.first)
        costs = self._costs[:, block.part]
        before = self._workspace.array("before", max(0, num_instances - 2), num_runs)
        """[-k, run]: f[j][k] of the requests before the run."""
        sums = self._workspace.array("sums", len(before), num_runs)
        for k in range(2, num_instances):
            # Every batch takes an instance, so a row of f follows from those before it, all of it at once.
            self.least[k - 2].take(block.first, out=before[1 - k], mode="clip")
            candidates = np.add(before[1 - k :], costs[: k - 1], out=sums[: k - 1])
            if self._is_memory_short:
                self._forbid(candidates, self._sums(3, block), k)
            least = np.minimum.reduceat(np.minimum.reduce(candidates), block.offsets)
            known = self.least[k - 1, entries]
            np.minimum(known, least, out=known)

    def _sums(self, row: int, block: Block) -> Float[np.ndarray, " block_runs"]:
        """Of one kind of load, over each run of a block."""
        return self._upto[row].take(block.last) - self._before(row).take(block.first)

    @functools.cached_property
    def _free(self) -> Int[np.ndarray, " instances"]:
        """Slots on the first 1, 2, ... instances, which matter where memory is short."""
        return np.array(self._free_tokens, np.int64).cumsum()

    def _before(self, row: int) -> Float[np.ndarray, " requests"]:
        """Sums of one kind of load over all requests before each."""
        return self._upto[row] - self._loads[row]

    def trace_back(self, num_instances: int) -> tuple[Batch, ...] | None:
        """The batches behind the least f[n][k] of no more than so many instances, at least 2, found again from the last
        to the first; None if it is infinite."""
        i = len(self._runs.parts)
        least = self.least[:num_instances, i].tolist()
        if num_instances == len(self._costs):
            least[-1] = min(least[-1], self._candidates(i, num_instances).min())
        k = least.index(min(least)) + 1
        if least[k - 1] == np.inf:
            return None
        batches: list[Batch] = []
        while k > 1:
            candidates = self._candidates(i, k)
            num_runs = candidates.shape[1]
            dop_less_1, index = divmod(int(candidates.argmin()), num_runs)
            if candidates[dop_less_1, index] > self.least[k - 1, i]:  # one batch costs less
                break
            begin = i - num_runs + index
            batches.append(Batch(range(begin, i), range(k - 1 - dop_less_1, k)))
            i, k = begin, k - 1 - dop_less_1
        batches.append(Batch(range(i), range(k)))
        return tuple(reversed(batches))

    def _candidates(self, i: int, k: int) -> Float[np.ndarray, "dops runs"]:
        """Of the runs that end with the i-th request, each on the last 1, 2, ... of k instances: their costs, and of
        what is before them on the others, at least one."""
        part = self._runs.parts[i - 1]
        begin = i - (part.stop - part.start)
        candidates = self.least[k - 2 :: -1, begin:i] + self._costs[: k - 1, part]
        if self._is_memory_short:
            self._forbid(candidates, self._upto[3, i - 1] - self._before(3)[begin:i], k)
        return candidates

    def _forbid(
        self, candidates: Float[np.ndarray, "dops runs"], num_slots: Float[np.ndarray, " runs"], k: int
    ) -> None:
        """Makes infinite what the last 1, 2, ... of k instances cannot hold of runs that take so many slots."""
        candidates[num_slots > (self._free[k - 1] - self._free[: k - 1][::-1])[:, None]] = np.inf
