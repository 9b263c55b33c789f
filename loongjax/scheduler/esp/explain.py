"""Why a decision was made: the terms of its gain and its cost, as values and as JSON lines.

The gain, and below it the cost, follow from the terms of the same decision:

    dispatch    gain_weight x max(0, wait_otherwise_s - wait_s)
                pause_weight x (wait_s - group_ready_s + prefill_s)
    put-off     loss_weight x fixed_s
                gain_weight x waited_s
    tie         gain_weight x max(0, wait_otherwise_s - wait_s)
                pause_weight x prefill_s + tie_weight_s
    allocate    gain_weight x (ready_without_s + prefill_without_s - ready_s - prefill_s) - newcomers_weight_s
                pause_weight x (ready_s - group_ready_s + prefill_s)
    migrate     as dispatch or, with ready_s among the terms, as allocate, but without newcomers_weight_s
                (gain_weight + pause_weight) x migration_s + slowdown_weight_s
    wait        as allocate
                paused_weight x max(0, ready_s - ready_without_s)
    spare       arriving_weight_per_s / 2 x (lost(taken_s) - lost(taken_spared_s)), where lost(0) = 0 and else
                lost(t) = max(0, t - slower_s)^2
                max(0, prefills_spared_weight_s - prefills_weight_s)
    batch       0
                cost_weight x prefill_s
    senior      0, whatever it costs
    scale-up, scale-down
                num_steps x (step_s - step_then_s)
                migration_s

Where the first request may be overtaken no more, migrate and wait are compared with a pause for it: their gain is
pause_weight x prefill_s, and that wait costs gain_weight x wait_s. They have no wait_otherwise_s and no ready_s then.
Where the only instance is spared, there are no prefills to compare, and the cost is
(gain_weight + behind_weight) x wait_s.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Literal

from loongjax.core.cluster import InstanceId

Step = Literal[
    "dispatch", "put-off", "tie", "allocate", "migrate", "wait", "spare", "batch", "senior", "scale-up", "scale-down"
]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """One question that the policy answered for itself."""

    now_s: float
    """On the engine's clock."""
    step: Step
    """dispatch: pause decodes to prefill requests that fit nowhere else (equations 1 and 2). put-off: decode on so that
    more requests share the pause. tie: cut a request over decode groups none of which has room for it. allocate: give
    prefills more instances by pausing decodes, migrate: by moving their keys (equations 3 and 4), wait: by waiting for
    prefills to end. spare: leave an instance idle for requests that are still to come. batch: one prefill of the split
    (equation 5). senior: the first request has waited enough. scale-up: a master more for a decode group's computing.
    scale-down: an instance less, by moving keys."""
    is_taken: bool
    gain: float
    """In seconds x weight (`loongjax.scheduler.esp.objective`); in seconds for scale-up and scale-down."""
    cost: float
    """As the gain; of a batch the predicted time x weight. Where no instance is spared it may be more."""
    instances: tuple[InstanceId, ...]
    """What the question was about."""
    request_ids: tuple[str, ...] = ()
    """Those who gain."""
    terms: tuple[tuple[str, float], ...] = ()
    """(name, value) of what gain and cost were computed from, as above; names end in their unit, those of numbers begin
    with num."""
    is_rehearsal: bool = False
    """Whether it is of an answer about the future, which the engine has not followed so far."""


Terms = tuple[tuple[str, float], ...]
Sink = Callable[[Decision], None]


class Rehearsal:
    """A sink for a policy that is asked about the future: marks all decisions, and tells them again as real ones once
    its answer is followed.
    """

    def __init__(self, sink: Sink) -> None:
        """`sink`: of the policy that was copied, which may be for a rehearsal itself."""
        self._sink: Sink = sink._sink if isinstance(sink, Rehearsal) else sink
        self._decisions: list[Decision] = []

    def __call__(self, decision: Decision) -> None:
        self._decisions.append(decision)
        self._sink(dataclasses.replace(decision, is_rehearsal=True))

    def follow(self) -> Sink:
        """Tells what was decided, and returns where to tell what follows."""
        for decision in self._decisions:
            self._sink(decision)
        return self._sink


class JsonLines:
    """A sink that appends every decision to a file, one JSON object a line, and flushes it.

    The engine also asks ahead of time. What it acts on are the lines in which `is_rehearsal` is false, each once; one
    that was rehearsed comes again when it is followed, with the time at which it was decided. Steps that a simulation
    jumps over are in none of them.
    """

    def __init__(self, path: str | pathlib.Path) -> None:
        """Raises OSError if the file cannot be written."""
        self._file = pathlib.Path(path).open("a", encoding="utf-8")  # noqa: SIM115

    def __call__(self, decision: Decision) -> None:
        fields = dataclasses.asdict(decision) | {"terms": dict(decision.terms)}
        self._file.write(json.dumps(fields) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
