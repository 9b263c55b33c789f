"""Before the clock starts: every program that greedy requests may need is built, and run on every group."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

import numpy as np
import tqdm

from loongjax.core.cluster import Group
from loongjax.core.iteration import (
    DecodeInput,
    DecodeIteration,
    DecodeSubBatch,
    ExtendInput,
    ExtendIteration,
    InstanceTable,
    Iteration,
    MigrateIteration,
    PrefillInput,
    PrefillIteration,
)
from loongjax.core.request import Request
from loongjax.core.sampling import SamplingParams
from loongjax.errors import EngineError
from loongjax.runtime.buckets import Buckets, fit
from loongjax.runtime.packing import sample_capacity
from loongjax.runtime.program_calls import ProgramKey
from loongjax.runtime.protocol import WARM_UP_ROUNDS
from loongjax_profiling.compiling_runtime import CompilingRuntime

TIMEOUT_S = 600.0
"""An iteration that takes longer, its compilation included, will not come back."""
REQUEST = Request(
    request_id="rehearsal",
    prompt_token_ids=(0,),
    sampling=SamplingParams(temperature=0.0, ignore_eos=True),
    max_tokens=1 << 20,
    seed=0,
)


def rehearse(runtime: CompilingRuntime, *, max_extend_tokens: int | None, progress: bool = False) -> int:
    """Runs iterations of every bucket on every group, on a pool that nobody uses yet, and says so beforehand.

    On GPUs one compilation serves all groups of a size, so these come first and side by side.

    Args:
        runtime: at rest.
        max_extend_tokens: of the largest extend; None: there are none.
        progress: whether to show bars.

    Returns:
        How many iterations that took.

    Raises:
        EngineError: one of them failed.
    """
    buckets = Buckets.of(runtime.shape, runtime.limits)
    num_instances = runtime.shape.num_instances
    sizes = range(1, num_instances + 1)
    keys = [key for dop in sizes for key in _programs(dop, buckets, max_extend_tokens)]
    scenes = _Scenes(buckets, runtime.limits.max_num_seqs, max_extend_tokens)
    groups = [Group.of(chosen) for dop in sizes for chosen in itertools.combinations(range(num_instances), dop)]
    number = WARM_UP_ROUNDS * sum(
        [math.comb(num_instances, dop) * sum(1 for _ in scenes.all_of(Group.of(range(dop)))) for dop in sizes]
    )
    print(
        f"rehearsing {number} iterations of {len(keys)} sizes on {len(groups)} groups: --num-instances and "
        "--max-num-batched-tokens make it fewer, --warm-up False leaves it out",
        flush=True,
    )
    runtime.compile(keys)
    num_iterations = 0
    # Round by round: whenever XLA loads an executable with graphs, it drops the graphs of all others.
    for index in range(WARM_UP_ROUNDS):
        title = f"Rehearsing, round {index + 1} of {WARM_UP_ROUNDS}"
        for group in tqdm.tqdm(groups, desc=title, unit="group", disable=not progress):
            for iteration in scenes.all_of(group):
                _run(runtime, dataclasses.replace(iteration, iteration_id=-1 - num_iterations))
                num_iterations += 1
    return num_iterations


def _run(runtime: CompilingRuntime, iteration: Iteration) -> None:
    runtime.submit(iteration)
    completions = runtime.completions(TIMEOUT_S)
    if not completions or completions[0].error is not None:
        reason = completions[0].error if completions else f"it did not end within {TIMEOUT_S:.0f} s"
        raise EngineError(f"the rehearsal failed, at a {type(iteration).__name__} on {iteration.group}: {reason}")


def _programs(dop: int, buckets: Buckets, max_extend_tokens: int | None) -> Iterator[ProgramKey]:
    for num_tokens in buckets.num_tokens:
        yield ProgramKey("prefill", dop, num_tokens)
    for num_rows in buckets.num_rows:
        if num_rows <= sample_capacity(dop, buckets):
            yield ProgramKey("head", dop, num_rows)
        yield ProgramKey("sample", dop, num_rows)
        yield ProgramKey("decode", dop, num_rows)
    extend_sizes: list[tuple[int, int]] = []
    if dop == 1 and max_extend_tokens is not None:
        extend_sizes += _extend_sizes(buckets, max_extend_tokens)
    for num_rows in sorted({*buckets.num_rows, *[num_tokens for num_tokens, _ in extend_sizes]}):
        for num_sampled in buckets.num_rows:
            if num_sampled <= sample_capacity(dop, buckets):
                yield ProgramKey("await", dop, num_rows, num_sampled)
    if dop == 2:
        yield ProgramKey("migrate", dop)
    for num_tokens, num_requests in extend_sizes:
        yield ProgramKey("extend", dop, num_tokens, fit(num_requests, buckets.num_rows))


def _extend_sizes(buckets: Buckets, max_extend_tokens: int) -> Iterator[tuple[int, int]]:
    """Tokens and requests of an extend for each of its programs."""
    largest = fit(min(max_extend_tokens, buckets.num_tokens[-1]), buckets.num_tokens)
    for num_tokens in buckets.num_tokens[: buckets.num_tokens.index(largest) + 1]:
        for num_rows in buckets.num_rows:
            num_requests = min(num_rows, num_tokens)
            if fit(num_requests, buckets.num_rows) == num_rows:
                yield num_tokens, num_requests


@dataclasses.dataclass(frozen=True)
class _Scenes:
    buckets: Buckets
    max_num_seqs: int
    max_extend_tokens: int | None

    def all_of(self, group: Group) -> Iterator[Iteration]:
        """Iterations of every bucket of what this group may be given. They read and write the pool's first page."""
        dop = group.dop
        for num_tokens in self.buckets.num_tokens:
            yield _prefill(group, 1, num_tokens * dop)
        for num_rows in self.buckets.num_rows:
            num_requests = min(num_rows * dop, self.max_num_seqs)
            if fit(-(-num_requests // dop), self.buckets.num_rows) == num_rows:
                for num_decoded in self.buckets.num_rows:
                    yield _prefill(group, num_requests, 1)
                    yield _decode(group, num_decoded, is_awaited=True)
            for continues in (False, True):
                yield _decode(group, num_rows, continues=continues)
        if dop == 2:
            source, target = group.instances
            slots = np.zeros(1, np.int32)
            yield MigrateIteration(0, source, target, slots, slots)
        if dop == 1 and self.max_extend_tokens is not None:
            for num_tokens, num_requests in _extend_sizes(self.buckets, self.max_extend_tokens):
                yield _extend(group, num_requests, num_tokens - num_requests + 1)
                yield _decode(group, num_requests)
                yield _extend(group, 1, num_tokens, is_awaited=True)


def _prefill(group: Group, num_requests: int, num_tokens: int) -> PrefillIteration:
    """Of requests of so many tokens each, whose keys nobody keeps."""
    item = PrefillInput(REQUEST, np.zeros(num_tokens, np.int32), (), False)
    return PrefillIteration(0, group, (item,) * num_requests)


def _decode(group: Group, num_requests: int, *, continues: bool = False, is_awaited: bool = False) -> DecodeIteration:
    master = group.instances[0]
    table = InstanceTable(master, np.zeros(1, np.int32), 1 + continues)
    item = DecodeInput(REQUEST, (), int(continues), 0, (table,), is_awaited)
    return DecodeIteration(0, group, (DecodeSubBatch(master, (item,) * num_requests),), continues)


def _extend(group: Group, num_requests: int, first_len: int, *, is_awaited: bool = False) -> ExtendIteration:
    """Of one chunk of so many tokens, and tokens by themselves."""
    (instance,) = group.instances
    table = InstanceTable(instance, np.zeros(1, np.int32), 1)
    inputs = [
        ExtendInput(REQUEST, np.zeros(length, np.int32), 0, np.zeros(length, np.int32), table, (), True, is_awaited)
        for length in (first_len, *[1] * (num_requests - 1))
    ]
    return ExtendIteration(0, group, tuple(inputs))
