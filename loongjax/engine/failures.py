"""Whose fault a failed iteration is: a request's, the devices', or nobody's yet."""

from __future__ import annotations

import collections
from collections.abc import Sequence

from loongjax.core.cluster import Group, InstanceId
from loongjax.engine.live_request import LiveRequest

MAX_FAILURES = 2
"""Failed iterations that end a request which got no token in between. After the first it is prefilled alone, so that
only its own failures are counted from then on."""

MAX_FAILURES_IN_A_ROW = 3
"""Failed iterations with no success in between, anywhere or on one instance, that end the engine. One less does already
if the last of them ends no request: then it is no request's fault."""


class Failures:
    """Counts failures since the last success, of requests, of instances and of the whole engine."""

    def __init__(self) -> None:
        self._num_in_a_row = 0
        """Iterations that failed since one succeeded anywhere."""
        self._num_on: collections.Counter[InstanceId] = collections.Counter()
        """Iterations that failed on an instance since one succeeded there."""

    def note_success(self, group: Group) -> None:
        """Notes that an iteration succeeded there. A request that got a token of it is cleared by the caller."""
        self._num_in_a_row = 0
        for instance in group.instances:
            self._num_on[instance] = 0

    def note_failure(self, group: Group, participants: Sequence[LiveRequest]) -> list[LiveRequest] | None:
        """The requests that failed too often and have to end; None if the devices have."""
        self._num_in_a_row += 1
        self._num_on.update(group.instances)
        for live in participants:
            live.num_failures += 1
        culprits = [live for live in participants if live.num_failures >= MAX_FAILURES]
        num_in_a_row = max(self._num_in_a_row, *(self._num_on[instance] for instance in group.instances))
        most = MAX_FAILURES_IN_A_ROW if culprits else MAX_FAILURES_IN_A_ROW - 1
        return culprits if num_in_a_row < most else None
