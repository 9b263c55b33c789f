"""Questions of a simulated engine are timed as they come, and answered as without a clock."""

from __future__ import annotations

import json
import pathlib
import time

import pytest
from numpy.random import default_rng

from benchmarks import decide_while_serving
from benchmarks.decide import CASES, make_policy, make_view
from benchmarks.decide_while_serving import Log, TimedPolicy, main


def test_results_say_what_was_asked(tmp_path: pathlib.Path, monkeypatch) -> None:
    monkeypatch.setattr(decide_while_serving, "NUM_LIVE", 330)
    monkeypatch.setattr(decide_while_serving, "STEP_S", 0.05)
    out = tmp_path / "decide.json"
    assert main(["--samples", "40", "--ended-before", "3", "--pause-s", "0", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["num_questions"] >= 40
    # All who live run or wait; one who ends is followed before the next question, or just after it.
    assert 325 <= result["mean_running"] + result["mean_waiting"] <= 330
    assert result["mean_running"] > 30
    assert result["mean_waiting"] > 30
    assert 0.0 < result["share_with_prefills"] < 1.0
    assert 0.0 < result["cpu_p50_ms"] <= result["cpu_p99_ms"]


def test_questions_wait_for_their_time_unless_they_are_late(monkeypatch) -> None:
    clock = [1000.0]
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(round(seconds, 6))
        clock[0] += seconds

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(time, "sleep", sleep)
    log = Log(pause_s=None)
    for question_s, takes_s in (
        (5.0, 0.001),
        (5.004, 0.002),
        (5.004, 0.001),
        (5.005, 0.009),
        (5.006, 0.0),
        (5.016, 0.0),
    ):
        log._wait(question_s)
        clock[0] += takes_s
    # The first sets the clock; then 4 ms less 1; none, since 2 are gone; none, for it comes 2 ms late, from where the
    # clock goes on; none, 8 ms late; and 10 ms more.
    assert slept == [0.0, 0.003, 0.0, 0.0, 0.0, 0.01]
    assert log.waited_ms == pytest.approx([1e3 * seconds for seconds in slept])


def test_a_pause_may_be_the_same_before_all(monkeypatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    log = Log(pause_s=0.25)
    log._wait(1.0)
    log._wait(1.0)
    assert slept == [0.25, 0.25]


def test_answers_are_those_of_the_policy_and_counted_for_its_copies_too() -> None:
    case = CASES["half are vacant"]
    view, policy = make_view(case, default_rng(0)), make_policy(case, default_rng(1))
    log = Log(pause_s=0.0)
    timed = TimedPolicy(policy.copy(), log)
    expected = policy.copy().plan(view)
    assert timed.copy().plan(view) == expected
    assert log.cpu_ms == []
    log.is_on = True
    assert timed.copy().plan(view) == timed.plan(view) == expected
    assert len(log.cpu_ms) == len(log.wall_ms) == 2
    assert log.num_waiting == [1000, 1000]
    assert log.num_prefilled[0] > 0
