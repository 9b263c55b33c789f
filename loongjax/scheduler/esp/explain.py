"""Why a decision was made: the terms of its gain and its cost, as values and as JSON lines."""

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
    """(name, value) of what gain and cost were computed from; names end in their unit."""


Sink = Callable[[Decision], None]


class JsonLines:
    """A sink that appends every decision to a file, one JSON object a line, and flushes it.

    The engine also asks ahead of time, so the same decision may come more than once.
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
