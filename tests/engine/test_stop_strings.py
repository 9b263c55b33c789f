"""Stop strings, however the text is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loongjax.engine.stop_strings import StopStrings


def stream(stops: list[str], pieces: list[str], *, include: bool = False) -> tuple[str, str | None]:
    """All text that went out, and the stop string."""
    search = StopStrings(stops, include_in_output=include)
    text = ""
    for piece in pieces:
        match = search.push(piece)
        text += match.text
        if match.stop is not None:
            return text, match.stop
    return text + search.finish(), None


def definition(stops: list[str], text: str) -> tuple[str, str | None]:
    """Character by character: the first time that a stop string ends the text, the longest one."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    pieces=st.lists(st.text("abc", max_size=4), max_size=12),
)
def test_the_answer_does_not_depend_on_how_the_text_is_cut(stops: list[str], pieces: list[str]) -> None:
    assert stream(stops, pieces) == definition(stops, "".join(pieces))


@given(
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    pieces=st.lists(st.text("abc", max_size=4), max_size=12),
)
def test_the_stop_string_can_stay_in_the_text(stops: list[str], pieces: list[str]) -> None:
    text, stop = definition(stops, "".join(pieces))
    assert stream(stops, pieces, include=True) == (text + (stop or ""), stop)


@given(stop=st.text("ab", min_size=1, max_size=4), pieces=st.lists(st.text("abc", max_size=4), max_size=12))
def test_nothing_goes_out_that_may_begin_a_stop_string_and_nothing_else_is_held(stop: str, pieces: list[str]) -> None:
    search = StopStrings([stop])
    seen, out = "", ""
    for piece in pieces:
        match = search.push(piece)
        seen, out = seen + piece, out + match.text
        if match.stop is not None:
            return
        held = seen[len(out) :]
        assert seen == out + held
        assert stop.startswith(held)
        assert not any(seen.endswith(stop[:length]) for length in range(len(held) + 1, len(stop)))


def test_a_stop_string_that_may_not_stop_yet_is_text() -> None:
    search = StopStrings(["end"])
    assert search.push("the end", may_stop=False).text == "the end"
    assert search.push(" the end").stop == "end"


def test_a_stop_string_that_began_before_it_may_stop_counts_when_it_is_complete() -> None:
    search = StopStrings(["end"])
    assert search.push("the en", may_stop=False).text == "the "
    match = search.push("d")
    assert (match.text, match.stop) == ("", "end")


@pytest.mark.parametrize("stops", [[], ["xyz"]])
def test_text_without_stop_strings_goes_out_at_once(stops: list[str]) -> None:
    assert StopStrings(stops).push("abc").text == "abc"
