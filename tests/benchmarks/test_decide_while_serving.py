"""Questions of a simulated engine are timed as they come, and answered as without a clock."""

from __future__ import annotations

import json
import pathlib

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
