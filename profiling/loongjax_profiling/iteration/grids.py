"""What there is to measure, by name: the paper's groups of points, on the devices at hand.

Batch sizes and lengths are the paper's for 8 devices of 80 GB; strategies are those of as many devices as there are.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, get_args

from loongjax.costmodel.work import Strategy
from loongjax_profiling.iteration.case import Case

GridName = Literal[
    "toy",
    "example",
    "figure2",
    "figure3",
    "figure13",
    "sp-vs-tp",
    "analytical-model",
    "multi-node",
    "tp-base",
    "scale-up",
    "scale-down",
    "chunks",
]

CPU_SHRINK = 256


Work = tuple[int, int]
"""Requests, and tokens of each."""

LONG_LENS = (10, 100, 1000, 10_000, 20_000, 50_000, 100_000, 200_000, 400_000)
MODEL_LENS = (10, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000, 400_000, 500_000)
MODEL_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 196, 256, 384, 512, 768, 1024)
MODEL_STRATEGIES = tuple(Strategy(sp, tp) for tp in (1, 2, 4, 8) for sp in range(1, 8 // tp + 1))
MULTI_NODE_STRATEGIES = (*MODEL_STRATEGIES, *(Strategy(sp, 2) for sp in (5, 6, 7, 8)))
MIGRATED_LENS = (100, 1000, 10_000, 50_000)
COARSE = (frozenset({1, 2, 16, 48, 256}), frozenset({10, 100, 1000, 10_000, 100_000}))
"""Batch sizes and lengths of the analytical model's first pass: all scales, few points. Batches both of the sizes that
engines pad to and of others, since nothing else tells a padded row from a row."""
MEDIUM = (COARSE[0] | {4, 32, 64, 128}, COARSE[1] | {500, 5000, 50_000, 200_000})
"""Of its second pass; the third has all the others."""
TP_BASE_LENS = (10, 100, 1000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000, 400_000)
CHUNK_LENS = ((128, 512, 2048), (32, 256, 1024, 4096, 8192))
"""Of the first pass of chunks, and of the second besides."""
PAST_LENS = ((1000, 10_000, 100_000), (100, 5000, 50_000, 200_000))
"""Tokens before each chunk, likewise."""
CHUNK_BATCHES = (((1, 0), (1, 16)), ((4, 0), (1, 4), (1, 64)))
"""Chunks, and decodes beside them, likewise."""
FIGURE2_WORKS: tuple[Work, ...] = (
    (16, 10), (16, 50), (16, 100), (16, 500), (1, 100), (1, 1000), (1, 10_000), (1, 100_000)
)  # fmt: skip
FIGURE3_WORKS: tuple[Work, ...] = ((512, 1000), (128, 5000), (64, 10_000), (16, 50_000), (4, 100_000), (1, 500_000))
FIGURE13_WORKS: tuple[Work, ...] = (
    (1024, 10), (256, 100), (64, 1000), (16, 10_000), (4, 50_000), (2, 100_000), (1, 200_000)
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """Points in passes: after each of them a measurement that ends there is useful."""

    passes: tuple[tuple[Case, ...], ...]

    @property
    def cases(self) -> tuple[Case, ...]:
        return tuple(itertools.chain.from_iterable(self.passes))


def build_grid(name: GridName, *, num_devices: int, shrink: int = 1) -> Grid:
    """The group of this name for so many devices.

    Args:
        name: of the group.
        num_devices: strategies take at most as many.
        shrink: divides all lengths; works that become equal are one.
    """
    seen: set[Case] = set()
    passes: list[tuple[Case, ...]] = []
    for cases in _GRIDS[name](num_devices):
        shrunk = [case.shrunk(shrink) for case in cases]
        passes.append(tuple(dict.fromkeys(case for case in shrunk if case not in seen)))
        seen.update(shrunk)
    return Grid(passes=tuple(passes))


def default_shrink(platform: str) -> int:
    """What lengths are divided by on devices of a platform, "gpu" or "cpu", unless it is given."""
    return 1 if platform == "gpu" else CPU_SHRINK


def widest(num_devices: int) -> Strategy:
    """The paper's sp4 tp2 on 8 devices; on fewer, as many instances as that, of fewer devices."""
    sp = min(4, num_devices)
    return Strategy(sp, max(1, min(2, num_devices // sp)))


def whole_machine(num_devices: int) -> tuple[Strategy, ...]:
    """Figure 3's: every way to cut a power of two of devices, at most 8, into instances of one size, with at most 4
    instances of 8."""
    num = 1 << (min(num_devices, 8).bit_length() - 1)
    return tuple(Strategy(num // tp, tp) for tp in (8, 4, 2, 1) if tp <= num and num // tp <= 4)


def figure3_masters(strategy: Strategy, batch_size: int) -> int:
    """As many masters as the paper's runs had: all instances for the largest batch, half for the next two, else one."""
    return {512: strategy.sp, 128: max(1, strategy.sp // 2), 64: max(1, strategy.sp // 2)}.get(batch_size, 1)


def doublings(most: int) -> tuple[int, ...]:
    """1, 2, 4, ... up to `most`."""
    return tuple(1 << k for k in range(most.bit_length()))


Passes = Iterable[Sequence[Case]]


def _toy(num_devices: int) -> Passes:
    yield _both(widest(num_devices), (1, 100))


def _example(_: int) -> Passes:
    yield _both(Strategy(1), (1, 100))


def _figure2(num_devices: int) -> Passes:
    tps = [tp for tp in doublings(num_devices) if tp <= 8]
    yield [case for tp in tps for work in FIGURE2_WORKS for case in _both(Strategy(1, tp), work)]


def _figure3(num_devices: int) -> Passes:
    yield [
        case
        for strategy in whole_machine(num_devices)
        for work in FIGURE3_WORKS
        for case in _both(strategy, work, (figure3_masters(strategy, work[0]),))
    ]


def _figure13(num_devices: int) -> Passes:
    for passes in zip(_scale_down(num_devices), _scale_up(num_devices), strict=True):
        unscaled = [_prefill(widest(num_devices), work) for work in FIGURE13_WORKS]
        yield [*unscaled, *itertools.chain.from_iterable(passes)]


def _scale_down(num_devices: int) -> Passes:
    yield [_prefill(widest(num_devices), work, scales_down=True) for work in FIGURE13_WORKS]


def _scale_up(num_devices: int) -> Passes:
    strategy = widest(num_devices)
    yield [case for work in FIGURE13_WORKS for case in _decodes(strategy, work, doublings(strategy.sp))]


def _sp_vs_tp(num_devices: int) -> Passes:
    strategies = [Strategy(num // tp, tp) for num in (1, 2, 4, 8) for tp in doublings(num)]
    chosen = [strategy for strategy in strategies if strategy.sp * strategy.tp <= num_devices]
    yield [case for strategy in chosen for length in LONG_LENS for case in _both(strategy, (1, length))]


def _tp_base(num_devices: int) -> Passes:
    works = itertools.product((1, 2, 4, 8, 16, 32, 48), TP_BASE_LENS)
    tps = [tp for tp in doublings(num_devices) if tp <= 8]
    yield [case for work in works for tp in tps for case in _both(Strategy(1, tp), work)]


def _analytical_model(num_devices: int, strategies: Sequence[Strategy] = MODEL_STRATEGIES) -> Passes:
    chosen = [strategy for strategy in strategies if strategy.sp * strategy.tp <= num_devices]
    migrations = [
        Case(kind="migration", strategy=Strategy(2, tp), input_len=length)
        for tp in sorted({strategy.tp for strategy in chosen if strategy.sp > 1})
        for length in MIGRATED_LENS
    ]
    everything = (frozenset(MODEL_BATCH_SIZES), frozenset(MODEL_LENS))
    for index, (batch_sizes, lens) in enumerate((COARSE, MEDIUM, everything)):
        works = [(b, n) for b in MODEL_BATCH_SIZES for n in MODEL_LENS if b in batch_sizes and n in lens]
        points = [case for s in chosen for work in works for case in _both(s, work, (1, s.sp))]
        yield [*points, *migrations] if index == 0 else points


def _multi_node(num_devices: int) -> Passes:
    return _analytical_model(num_devices, MULTI_NODE_STRATEGIES)


def _chunks(num_devices: int) -> Passes:
    """One chunk by itself, several, and one beside decodes."""
    chosen = [Strategy(1, tp) for tp in doublings(num_devices) if tp <= 8]
    for number in range(1, len(CHUNK_LENS) + 1):
        lens, pasts = _joined(CHUNK_LENS[:number]), _joined(PAST_LENS[:number])
        yield [
            Case(
                kind="extend",
                strategy=strategy,
                batch_size=batch_size,
                input_len=input_len,
                past_len=past_len,
                num_decodes=num_decodes,
            )
            for strategy in chosen
            for input_len, past_len in itertools.product(lens, pasts)
            for batch_size, num_decodes in _joined(CHUNK_BATCHES[:number])
        ]


def _joined[T](parts: Iterable[Sequence[T]]) -> list[T]:
    return list(itertools.chain.from_iterable(parts))


def _both(strategy: Strategy, work: Work, masters: Iterable[int] = (1,)) -> list[Case]:
    return [_prefill(strategy, work), *_decodes(strategy, work, masters)]


def _prefill(strategy: Strategy, work: Work, *, scales_down: bool = False) -> Case:
    batch_size, input_len = work
    return Case(kind="prefill", strategy=strategy, batch_size=batch_size, input_len=input_len, scales_down=scales_down)


def _decodes(strategy: Strategy, work: Work, masters: Iterable[int]) -> list[Case]:
    """With each of these numbers of masters, as far as there are requests for them."""
    batch_size, input_len = work
    return [
        Case(kind="decode", strategy=strategy, batch_size=batch_size, input_len=input_len, num_masters=num_masters)
        for num_masters in dict.fromkeys(min(number, batch_size) for number in masters)
    ]


_GRIDS: dict[str, Callable[[int], Passes]] = {
    "toy": _toy,
    "example": _example,
    "figure2": _figure2,
    "figure3": _figure3,
    "figure13": _figure13,
    "sp-vs-tp": _sp_vs_tp,
    "analytical-model": _analytical_model,
    "multi-node": _multi_node,
    "tp-base": _tp_base,
    "scale-up": _scale_up,
    "scale-down": _scale_down,
    "chunks": _chunks,
}
assert tuple(_GRIDS) == get_args(GridName), "every name has its grid"
