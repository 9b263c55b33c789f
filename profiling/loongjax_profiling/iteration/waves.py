"""In which order points are measured, so that each program that has to be compiled pays for many of them."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator, Sequence

from loongjax.parallel.striped import local_length
from loongjax.runtime.buckets import Buckets, fit
from loongjax.runtime.program_calls import ProgramKey
from loongjax_profiling.iteration.case import Case

LIGHT_COST = 0.1
"""Of a program without layers, of which a model's has 1: about what it takes to compile beside that."""
HEAVY_PROGRAMS = ("prefill", "decode", "extend")
"""Those with all layers of the model."""

Needs = Callable[[Case], tuple[ProgramKey, ...]]
"""The programs of a case."""


def compile_cost(programs: Iterable[ProgramKey]) -> float:
    """What these take to compile, about, in programs of the model."""
    return sum((1.0 if key.name in HEAVY_PROGRAMS else LIGHT_COST for key in programs), 0.0)


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
        case "extend":
            tokens = fit(case.num_tokens, buckets.num_tokens)
            rows = fit(case.num_requests, buckets.num_rows)
            return (
                ProgramKey("extend", sp, tokens, rows),
                ProgramKey("head", sp, rows),
                ProgramKey("sample", sp, rows),
            )


def waves_of(
    passes: Sequence[Sequence[Case]],
    needs: Needs,
    expected_s: Callable[[Case], float],
    *,
    width: Callable[[], float],
) -> Iterator[tuple[Case, ...]]:
    """All cases, pass after pass, in waves: what those of one need is compiled before they are measured.

    Args:
        passes: after each of them a measurement that ends there is useful.
        needs: the programs of a case.
        expected_s: how long a case takes; within a wave, short ones come first.
        width: asked before each wave: how much its new programs may cost, unless its first cases need more.
    """
    have: set[ProgramKey] = set()
    for cases in passes:
        chosen: list[Case] = []
        cost, most = 0.0, width()
        for new_cost, bundle in _in_turns(cases, needs, expected_s, have):
            if cost and cost + new_cost > most:
                yield tuple(sorted(chosen, key=expected_s))
                chosen = []
                cost, most = 0.0, width()
            cost += new_cost
            chosen += bundle
        if chosen:
            yield tuple(sorted(chosen, key=expected_s))


def _in_turns(
    cases: Sequence[Case], needs: Needs, expected_s: Callable[[Case], float], have: set[ProgramKey]
) -> Iterator[tuple[float, list[Case]]]:
    """(cost of new programs, cases that need these), from each kind and strategy in turn, the least cost a case first.

    Those of whose programs only light ones are new do not wait for a turn. `have` takes in what was new.
    """
    bundles: dict[tuple, dict[frozenset[ProgramKey], list[Case]]] = collections.defaultdict(dict)
    for case in cases:
        bundles[case.kind, case.strategy].setdefault(frozenset(needs(case)), []).append(case)

    means_s = {
        (owner, needed): sum(map(expected_s, ready)) / len(ready)
        for owner, mine in bundles.items()
        for needed, ready in mine.items()
    }

    def rank(owner: tuple, needed: frozenset[ProgramKey]) -> tuple[float, float]:
        return compile_cost(needed - have) / len(bundles[owner][needed]), means_s[owner, needed]

    while bundles:
        bests = {owner: min(rank(owner, needed) for needed in mine) for owner, mine in bundles.items()}
        for owner in sorted(bests, key=bests.__getitem__):
            mine = bundles[owner]
            is_first = True
            while mine:
                cheapest = min(mine, key=lambda needed: rank(owner, needed))
                if not is_first and compile_cost(cheapest - have) >= 1.0:
                    break
                is_first = False
                cost = compile_cost(cheapest - have)
                have |= cheapest
                yield cost, mine.pop(cheapest)
            if not mine:
                del bundles[owner]
