"""What a scheduler is to the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from loongjax.core.plan import Plan
from loongjax.costmodel.corrector import Kind
from loongjax.costmodel.work import Strategy
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


@runtime_checkable
class ExplainedPolicy(Policy, Protocol):
    """A policy that tells why it decides, and what of that the engine acts on."""

    def note_followed(self) -> None:
        """The engine acts on the answers of this copy, and asks it instead of the other one from now on."""
        ...


@runtime_checkable
class PredictingPolicy(Policy, Protocol):
    """A policy that decides by predicted times."""

    def predicted_over_actual(self) -> Mapping[tuple[Kind, Strategy], float]:
        """How far its cost model's times of iterations have been off lately, by kind and strategy of those that were
        observed: above 1 they are too long. It decides by the corrected times.
        """
        ...
