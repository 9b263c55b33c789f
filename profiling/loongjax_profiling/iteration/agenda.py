"""What a run has to measure: the points of its grids, without those that are there already or cannot be run."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence, Set

from loongjax.core.cluster import ClusterShape
from loongjax.errors import ConfigError
from loongjax.models.config import ModelConfig
from loongjax.runtime.buckets import LEAST_NUM_TOKENS
from loongjax.runtime.protocol import RuntimeLimits
from loongjax_profiling.iteration.case import Case
from loongjax_profiling.iteration.command import MAX_NUM_BATCHED_TOKENS, IterationCommand
from loongjax_profiling.iteration.grids import build_grid, default_shrink
from loongjax_profiling.iteration.meter import FIRST_STEPS
from loongjax_profiling.iteration.placement import why_not

UNKNOWN_NUM_SLOTS = 1 << 40
"""A pool's, before its size is known: everything fits."""


class Agenda:
    """Chooses points, and counts what it leaves out by reason.

    Args:
        command: with the grids and the limits.
        model: whose iterations are measured.
        num_devices: that instances are made of.
        platform: of the devices, "gpu" or "cpu".
    """

    def __init__(self, command: IterationCommand, model: ModelConfig, *, num_devices: int, platform: str) -> None:
        self._command = command
        self._model = model
        self._num_devices = num_devices
        self._platform = platform
        self.left_out: collections.Counter[str] = collections.Counter()

    def passes(self, known: Set[Case]) -> list[list[Case]]:
        """What no known point tells, and no setting forbids: the passes of all grids side by side."""
        shrink = self._command.shrink or default_shrink(self._platform)
        grids = [build_grid(name, num_devices=self._num_devices, shrink=shrink) for name in self._command.grid]
        planned: set[Case] = set()
        passes: list[list[Case]] = []
        for index in range(max(len(grid.passes) for grid in grids)):
            cases = dict.fromkeys(case for grid in grids for case in (grid.passes[index : index + 1] or [()])[0])
            new = [case for case in cases if case not in planned]
            planned.update(new)
            passes.append([case for case in new if not self._leaves_out(case, self._reason_before(case, known))])
        return passes

    def fitting(self, cases: Iterable[Case], shape: ClusterShape, limits: RuntimeLimits) -> list[Case]:
        """Those that a runtime of this shape can run."""
        return [case for case in cases if not self._leaves_out(case, self._why_not(case, shape, limits))]

    def max_num_batched_tokens(self, cases: Sequence[Case]) -> int:
        """What a runtime needs for these, unless it is given: a doubling of the smallest bucket."""
        if self._command.max_num_batched_tokens is not None:
            return self._command.max_num_batched_tokens
        kinds = ("prefill", "extend")
        needed = max((-(-case.num_tokens // case.strategy.sp) for case in cases if case.kind in kinds), default=1)
        return LEAST_NUM_TOKENS << max(0, (-(-needed // LEAST_NUM_TOKENS) - 1).bit_length())

    def _leaves_out(self, case: Case, reason: str | None) -> bool:
        if reason is not None:
            self.left_out[reason] += 1
        return reason is not None

    def _reason_before(self, case: Case, known: Set[Case]) -> str | None:
        """Why a case is left out, as far as that is known before any runtime is built."""
        tp = case.strategy.tp
        if case in known:
            return "is in the database"
        if self._command.tp and tp not in self._command.tp:
            return "has another tp than --tp"
        try:
            self._model.check_tp(tp)
        except ConfigError:
            return "has a tp that does not divide the model"
        page_size = self._command.page_size
        shape = ClusterShape(
            num_instances=self._num_devices // tp,
            num_pages=(self._command.num_slots or UNKNOWN_NUM_SLOTS) // page_size,
            page_size=page_size,
            tp=tp,
        )
        most = MAX_NUM_BATCHED_TOKENS.get(self._platform, MAX_NUM_BATCHED_TOKENS["gpu"])
        limits = RuntimeLimits(
            max_model_len=self._model.context_len,
            max_num_batched_tokens=self._command.max_num_batched_tokens or most,
            max_num_seqs=self._command.max_num_seqs,
            vocab_size=self._model.vocab_size,
        )
        return self._why_not(case, shape, limits)

    def _why_not(self, case: Case, shape: ClusterShape, limits: RuntimeLimits) -> str | None:
        return why_not(
            case,
            shape=shape,
            limits=limits,
            num_steps=FIRST_STEPS + self._command.num_steps,
            context_len=self._model.context_len,
        )
