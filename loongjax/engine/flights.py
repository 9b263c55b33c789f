"""Iterations in flight, by instance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from loongjax.core.cluster import Group, InstanceId
from loongjax.core.iteration import RecoverIteration
from loongjax.core.plan import Decode, Extend, Prefill
from loongjax.engine.binding import Flight
from loongjax.engine.live_request import LiveRequest
from loongjax.runtime.buckets import fit


class Flights:
    """Iterations that were submitted and have not completed: at most two on an instance, and then of one group.

    Where there are two, the second is the decode that the first is, one token later and perhaps without some of its
    requests; or one is a prefill and the other a decode; or one is an extend and the other another one or a decode; or
    the second recovers from a failure before both.
    """

    def __init__(self, row_buckets: Sequence[int]) -> None:
        """`row_buckets`: sizes, ascending, that the sub-batches of decodes are padded to."""
        self._row_buckets = row_buckets
        self._flights: dict[int, Flight] = {}
        """By iteration id, in order of submission."""
        self._latest: dict[InstanceId, Flight] = {}
        """The last iteration submitted to each instance, in flight or not."""

    def __len__(self) -> int:
        return len(self._flights)

    def __iter__(self) -> Iterator[Flight]:
        return iter(self._flights.values())

    def depart(self, flight: Flight, now_s: float) -> None:
        """Notes a submission."""
        flight.submitted_s = flight.started_s = now_s
        self._flights[flight.iteration.iteration_id] = flight
        for instance in flight.group.instances:
            self._latest[instance] = flight

    def land(self, iteration_id: int, elapsed_s: float) -> Flight:
        """Notes a completion, so many seconds after the submission, and returns what completed."""
        landed = self._flights.pop(iteration_id)
        behind = self._latest[landed.group.instances[0]]
        if behind is not landed:
            behind.started_s = max(behind.started_s, landed.submitted_s + elapsed_s)
        return landed

    def find(self, iteration_id: int) -> Flight:
        """What is in flight under this id."""
        return self._flights[iteration_id]

    @property
    def busy_instances(self) -> set[InstanceId]:
        """Those that something in flight occupies."""
        return {instance for flight in self._flights.values() for instance in flight.group.instances}

    def by_instance(self) -> dict[InstanceId, list[Flight]]:
        """In order of submission, for every instance that is busy."""
        result: dict[InstanceId, list[Flight]] = {}
        for flight in self._flights.values():
            for instance in flight.group.instances:
                result.setdefault(instance, []).append(flight)
        return result

    def lone(self) -> list[Flight]:
        """Those with nothing behind or before them on their instances."""
        by_instance = self.by_instance()
        return [flight for flight in self._flights.values() if len(by_instance[flight.group.instances[0]]) == 1]

    def overdue(self, now_s: float, timeout_s: float) -> list[Flight]:
        """Those whose turn came longer ago than that, in order of submission."""
        overdue: list[Flight] = []
        taken: set[InstanceId] = set()
        for flight in self._flights.values():
            if now_s - flight.started_s > timeout_s and taken.isdisjoint(flight.group.instances):
                overdue.append(flight)
            taken.update(flight.group.instances)
        return overdue

    def continues(self, plan: Decode) -> bool:
        """Whether the last iteration of every instance of the group was this decode, one token earlier, with those who
        have left since. It begins again where fewer rows of padding do for those who are left.

        Stricter than `DecodeIteration.continues` has to be, so that a runtime may reuse memory between iterations.
        """
        latest = self._latest.get(plan.group.instances[0])
        return (
            latest is not None
            and isinstance(latest.plan, Decode)
            and plan.goes_on_from(latest.plan)
            and self._padded_rows(plan) == self._padded_rows(latest.plan)
            and all(self._latest.get(instance) is latest for instance in plan.group.instances)
        )

    def _padded_rows(self, decode: Decode) -> int:
        return fit(max([len(batch.request_ids) for batch in decode.sub_batches]), self._row_buckets)

    def void(self, group: Group) -> set[LiveRequest]:
        """The keys on these instances are lost: what is in flight there counts no longer.

        Nothing will continue it either: its requests are prefilled before they are decoded again.

        Returns:
            Those requests.
        """
        requests: set[LiveRequest] = set()
        for flight in self._flights.values():
            if not flight.group.isdisjoint(group):
                flight.is_void = True
                requests.update(flight.requests)
        return requests

    def leave_out(self, live: LiveRequest) -> None:
        """A request starts again: what is in flight has no result for it any more.

        That may be a migration between instances that work, of a request that has lost its keys on a third.
        """
        for flight in self._flights.values():
            if live in flight.requests:
                flight.requests = tuple([other for other in flight.requests if other is not live])

    def check_integrity(self) -> None:
        """Asserts that only iterations of one group share instances, and no more than two."""
        for instance, flights in self.by_instance().items():
            assert len(flights) <= 2, f"instance {instance}: {flights}"
            assert len({flight.group for flight in flights}) == 1, f"instance {instance}: {flights}"
            first, *behind = flights
            for flight in behind:
                kinds = type(first.plan), type(flight.plan)
                is_recovery = isinstance(flight.iteration, RecoverIteration)
                assert first.is_void if is_recovery else kinds in _ONE_BEHIND_THE_OTHER, flights


_ONE_BEHIND_THE_OTHER = {
    (Decode, Decode),
    (Decode, Prefill),
    (Prefill, Decode),
    (Decode, Extend),
    (Extend, Extend),
    (Extend, Decode),
}
