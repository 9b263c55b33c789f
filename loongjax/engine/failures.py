"""Whose fault a failed iteration is: a request's, or the devices'.

A failure alone does not tell. So the group is recovered (`RecoverIteration`): it computes something tiny, without any
request. If that fails too, or does not end in time, the devices are to blame, and the engine ends. If it succeeds, it
was a request: those that took part are computed alone, in one prefill or in chunks, until they get a token, and one
that fails again before that ends, however many such requests come in a row.
"""

from __future__ import annotations

from collections.abc import Sequence

from loongjax.core.cluster import Group
from loongjax.core.iteration import RecoverIteration
from loongjax.engine.binding import Flight
from loongjax.engine.flights import Flights
from loongjax.engine.live_request import LiveRequest

MAX_FAILURES = 2
"""Failed iterations that end a request which got no token in between. After the first it is computed alone, so that
only its own failures are counted from then on."""

RECOVERY_TIMEOUT_S = 120.0
"""How long a recovery may take, in seconds: on a GPU it takes some hundredths, on a CPU it may have to be compiled."""


def blame(participants: Sequence[LiveRequest]) -> list[LiveRequest]:
    """Counts a failure against those that took part in it, and returns those that failed too often and have to end."""
    for live in participants:
        live.num_failures += 1
    return [live for live in participants if live.num_failures >= MAX_FAILURES]


def recovery_failed(group: Group, error: str) -> str:
    """Why the engine ends when a recovery fails."""
    return f"the devices of instances {group.instances} fail even without a request: {error}"


def recovery_overdue(group: Group) -> str:
    """Why the engine ends when a recovery does not."""
    return f"the devices of instances {group.instances} did not answer within {RECOVERY_TIMEOUT_S:g} s after a failure"


def overdue_recoveries(flights: Flights, now_s: float) -> list[Flight]:
    """Recoveries that do not come back, in order of submission."""
    overdue = flights.overdue(now_s, RECOVERY_TIMEOUT_S)
    return [flight for flight in overdue if isinstance(flight.iteration, RecoverIteration)]
