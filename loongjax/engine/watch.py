"""Notices iterations that do not come back: a collective that hangs, a device that answers nothing."""

from __future__ import annotations

import logging

from loongjax.engine.binding import Flight
from loongjax.engine.flights import Flights

logger = logging.getLogger(__name__)


class Watch:
    """Tells of every iteration that is overdue, and of its end if it ends after all.

    It ends nothing: what is overdue may only be slow. Whoever asks for the engine's health decides what to do.
    """

    def __init__(self, flights: Flights, iteration_timeout_s: float) -> None:
        """A watch on these flights, which are overdue after so many seconds."""
        self._flights = flights
        self._timeout_s = iteration_timeout_s
        self._told: set[int] = set()
        """Ids of iterations that the log says are overdue."""

    def look(self, now_s: float) -> str | None:
        """What is overdue longest, if anything is. Logs each iteration once."""
        overdue = self._flights.overdue(now_s, self._timeout_s)
        complaints = [self._complaint(flight, now_s) for flight in overdue]
        for flight, complaint in zip(overdue, complaints, strict=True):
            if flight.iteration.iteration_id not in self._told:
                self._told.add(flight.iteration.iteration_id)
                logger.error("%s", complaint)
        return complaints[0] if complaints else None

    def note_landing(self, flight: Flight, now_s: float) -> None:
        """Says that an iteration which was overdue has ended."""
        iteration = flight.iteration
        if iteration.iteration_id in self._told:
            self._told.remove(iteration.iteration_id)
            elapsed_s = now_s - flight.started_s
            logger.warning(
                "iteration %d on instances %s ended after all, after %.0f s",
                iteration.iteration_id,
                flight.group.instances,
                elapsed_s,
            )

    def _complaint(self, flight: Flight, now_s: float) -> str:
        kind = type(flight.iteration).__name__.removesuffix("Iteration").lower()
        return (
            f"instances {flight.group.instances} have not answered for {now_s - flight.started_s:.0f} s: "
            f"iteration {flight.iteration.iteration_id} ({kind}) is in flight for longer than "
            f"iteration_timeout_s = {self._timeout_s:g}"
        )
