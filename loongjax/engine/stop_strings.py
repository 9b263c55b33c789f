"""Stop strings in a text that arrives in pieces."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class StopMatch:
    """Text that may go out, and the stop string that ended it, if one did."""

    text: str
    stop: str | None = None


class StopStrings:
    """Finds the first stop string to be completed, however the text is cut into pieces.

    Where two are completed by the same character, the longer one counts. Text that may be the beginning of a stop
    string is held back until it turns out not to be.
    """

    def __init__(self, stops: Sequence[str], *, include_in_output: bool = False) -> None:
        """A search in a text that has not begun.

        Args:
            stops: the strings, none of them empty.
            include_in_output: leave the one that was found in the text; otherwise the text ends before it.
        """
        self._stops = sorted(stops, key=len, reverse=True)
        self._max_held = max((len(stop) for stop in stops), default=1) - 1
        self._include_in_output = include_in_output
        self._held = ""

    def push(self, text: str, *, may_stop: bool = True) -> StopMatch:
        """What may go out now that this text follows.

        Args:
            text: the next piece.
            may_stop: whether a stop string that this piece completes ends the text; if not, it is text like any other.
        """
        num_seen = len(self._held)
        text = self._held + text
        if may_stop and (found := self._first_completed(text, num_seen)) is not None:
            stop, end = found
            self._held = ""
            return StopMatch(text[: end if self._include_in_output else end - len(stop)], stop)
        num_held = self._num_possible_beginning(text)
        self._held = text[len(text) - num_held :]
        return StopMatch(text[: len(text) - num_held])

    def finish(self) -> str:
        """The text held back, for no more will follow."""
        held, self._held = self._held, ""
        return held

    def _first_completed(self, text: str, num_seen: int) -> tuple[str, int] | None:
        """The stop string that ends first, but after the first `num_seen` characters; and where."""
        best: tuple[str, int] | None = None
        for stop in self._stops:
            begin = text.find(stop, max(0, num_seen + 1 - len(stop)))
            if begin >= 0 and (best is None or begin + len(stop) < best[1]):
                best = (stop, begin + len(stop))
        return best

    def _num_possible_beginning(self, text: str) -> int:
        """Length of the longest end of the text that begins a stop string and is not all of it."""
        for length in range(min(self._max_held, len(text)), 0, -1):
            end = text[len(text) - length :]
            if any(len(stop) > length and stop.startswith(end) for stop in self._stops):
                return length
        return 0
