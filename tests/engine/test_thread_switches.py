"""Threads take turns often while an engine runs, and as before afterwards."""

import sys

import pytest

from loongjax.engine.thread_switches import SWITCH_INTERVAL_S, frequent_thread_switches


@pytest.fixture(autouse=True)
def interval_s():
    before_s = sys.getswitchinterval()
    yield before_s
    sys.setswitchinterval(before_s)


def test_within_the_block_threads_take_turns_often_and_afterwards_as_before(interval_s):
    with frequent_thread_switches():
        assert sys.getswitchinterval() == pytest.approx(SWITCH_INTERVAL_S)
    assert sys.getswitchinterval() == interval_s


def test_an_error_leaves_the_interval_as_it_was(interval_s):
    with pytest.raises(KeyError), frequent_thread_switches():
        raise KeyError
    assert sys.getswitchinterval() == interval_s


def test_who_wants_it_oftener_still_keeps_that():
    sys.setswitchinterval(SWITCH_INTERVAL_S / 5)
    wanted_s = sys.getswitchinterval()
    with frequent_thread_switches():
        assert sys.getswitchinterval() == wanted_s
    assert sys.getswitchinterval() == wanted_s
