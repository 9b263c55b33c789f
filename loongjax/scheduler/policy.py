"""What a scheduler is to the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from loongjax.core.plan import Plan
from loongjax.scheduler.observation import Observation
from loongjax.scheduler.view import ClusterView


@runtime_checkable
class Policy(Protocol):
    """Decides who works with whom, and holds no device state.

    The engine asks whenever an iteration completes or a request arrives, applies the answer in order, and asks again
    at the next such event. A policy may remember what it saw (for fairness), but must cope with any snapshot: requests
    end and are aborted without notice.
    """

    def plan(self, view: ClusterView) -> tuple[Plan, ...]:
        """Plans to apply now, in this order.

        Their groups are disjoint and consist of instances that are not busy; no plan touches a request in flight. A
        `Preempt` frees its pages for the plans after it. `loongjax.scheduler.validate.check_plan` states the whole
        contract. If no instance is busy and any request lives, there is at least one iteration among them.
        """
        ...

    def observe(self, observations: Sequence[Observation]) -> None:
        """Takes in what has happened since the last question, in order. What it tells is no news to any view."""
        ...

    def copy(self) -> Policy:
        """A policy that remembers the same and can be asked instead of this one, or for nothing. Asked for often."""
        ...
