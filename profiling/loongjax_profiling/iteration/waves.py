"""In which order points are measured, so that each program that has to be compiled pays for many of them."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence, Set

from loongjax.parallel.striped import local_length
from loongjax.runtime.buckets import Buckets, fit
from loongjax.runtime.program_calls import ProgramKey
from loongjax_profiling.iteration.case import Case

WAVE_SIZE = 16
"""Programs that are compiled side by side before anything else is measured."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wave:
    """Programs, and the points that need no others but these and those of waves before."""

    programs: tuple[ProgramKey, ...]
    """In the order in which points need them."""
    cases: tuple[Case, ...]


def programs_of(case: Case, buckets: Buckets) -> tuple[ProgramKey, ...]:
    """What a runtime that pads to these sizes runs for a case."""
    sp = case.strategy.sp
    match case.kind:
        case "migration":
            return (ProgramKey("migrate", sp),)
        case "prefill":
            tokens = fit(local_length(case.num_tokens, sp), buckets.num_tokens)
            rows = fit(-(-case.batch_size // sp), buckets.num_rows)
            return (ProgramKey("prefill", sp, tokens), ProgramKey("head", sp, rows), ProgramKey("sample", sp, rows))
        case "decode":
            rows = fit(-(-case.batch_size // case.num_masters), buckets.num_rows)
            return (ProgramKey("decode", sp, rows), ProgramKey("sample", sp, rows))


def waves_of(
    passes: Sequence[Sequence[Case]],
    needs: Callable[[Case], tuple[ProgramKey, ...]],
    expected_s: Callable[[Case], float],
    *,
    size: int = WAVE_SIZE,
) -> Iterator[Wave]:
    """All cases, pass after pass, in waves of at most `size` new programs, or of one case that needs more.

    Args:
        passes: after each of them a measurement that ends there is useful.
        needs: the programs of a case.
        expected_s: how long a case takes; within a wave, short ones come first.
        size: of a wave.
    """
    compiled: set[ProgramKey] = set()
    for cases in passes:
        programs: list[ProgramKey] = []
        chosen: list[Case] = []
        for new, bundle in _in_turns(cases, needs, expected_s, frozenset(compiled)):
            if programs and len(programs) + len(new) > size:
                yield Wave(programs=tuple(programs), cases=tuple(sorted(chosen, key=expected_s)))
                programs, chosen = [], []
            programs += new
            chosen += bundle
            compiled.update(new)
        if chosen:
            yield Wave(programs=tuple(programs), cases=tuple(sorted(chosen, key=expected_s)))


def _in_turns(
    cases: Sequence[Case],
    needs: Callable[[Case], tuple[ProgramKey, ...]],
    expected_s: Callable[[Case], float],
    compiled: Set[ProgramKey],
) -> Iterator[tuple[list[ProgramKey], list[Case]]]:
    """(new programs, cases that need these), from each kind and strategy in turn, the largest gain a program first."""
    have = set(compiled)
    bundles: dict[tuple, dict[frozenset[ProgramKey], list[Case]]] = collections.defaultdict(dict)
    for case in cases:
        bundles[case.kind, case.strategy].setdefault(frozenset(needs(case)), []).append(case)
    while bundles:
        for owner in list(bundles):
            mine = bundles[owner]
            costs = {
                needed: (len(needed - have) / len(ready), sum(map(expected_s, ready)) / len(ready))
                for needed, ready in mine.items()
            }
            cheapest = min(costs, key=costs.__getitem__)
            ready = mine.pop(cheapest)
            yield [key for key in needs(ready[0]) if key not in have], ready
            have |= cheapest
            if not mine:
                del bundles[owner]
