"""Gain and cost once more, from nothing but the terms of a decision."""

from __future__ import annotations

import pytest

from loongjax.scheduler.esp.explain import Decision


def gain_and_cost(decision: Decision) -> tuple[float, float]:
    """By the table at the top of `explain.py`. Raises KeyError if a term is missing."""
    term = dict(decision.terms)
    match decision.step:
        case "dispatch":
            paused_s = term["wait_s"] - term["group_ready_s"] + term["prefill_s"]
            return _gain_of_waiting_less(term), term["pause_weight"] * paused_s
        case "put-off":
            return term["loss_weight"] * term["fixed_s"], term["gain_weight"] * term["waited_s"]
        case "tie":
            return _gain_of_waiting_less(term), term["pause_weight"] * term["prefill_s"] + term["tie_weight_s"]
        case "allocate":
            paused_s = term["ready_s"] - term["group_ready_s"] + term["prefill_s"]
            return _gain_of_instances(term) - term["newcomers_weight_s"], term["pause_weight"] * paused_s
        case "migrate":
            cost = (term["gain_weight"] + term["pause_weight"]) * term["migration_s"] + term["slowdown_weight_s"]
            if "ready_s" in term:
                return _gain_of_instances(term), cost
            return _gain_of_waiting_less(term) if "wait_otherwise_s" in term else _cost_of_pause(term), cost
        case "wait":
            if "ready_s" in term:
                wait_s = max(0.0, term["ready_s"] - term["ready_without_s"])
                return _gain_of_instances(term) - term["newcomers_weight_s"], term["paused_weight"] * wait_s
            return _cost_of_pause(term), term["gain_weight"] * term["wait_s"]
        case "spare":
            lost, still_lost = (
                max(0.0, term[name] - term["slower_s"]) ** 2 if term[name] else 0.0
                for name in ("taken_s", "taken_spared_s")
            )
            gain = term["arriving_weight_per_s"] / 2.0 * (lost - still_lost)
            if "wait_s" in term:
                return gain, (term["gain_weight"] + term["behind_weight"]) * term["wait_s"]
            return gain, max(0.0, term["prefills_spared_weight_s"] - term["prefills_weight_s"])
        case "batch":
            return 0.0, term["cost_weight"] * term["prefill_s"]
        case "senior":
            return 0.0, 0.0
        case "scale-up" | "scale-down":
            return term["num_steps"] * (term["step_s"] - term["step_then_s"]), term["migration_s"]


def check_terms(decision: Decision) -> None:
    """Asserts that the terms say it all."""
    gain, cost = gain_and_cost(decision)
    assert decision.gain == pytest.approx(gain, rel=1e-6, abs=1e-9), decision
    assert decision.cost == pytest.approx(cost, rel=1e-6, abs=1e-9), decision


def _gain_of_waiting_less(term: dict[str, float]) -> float:
    return term["gain_weight"] * max(0.0, term["wait_otherwise_s"] - term["wait_s"])


def _gain_of_instances(term: dict[str, float]) -> float:
    without_s = term["ready_without_s"] + term["prefill_without_s"]
    return term["gain_weight"] * (without_s - term["ready_s"] - term["prefill_s"])


def _cost_of_pause(term: dict[str, float]) -> float:
    return term["pause_weight"] * term["prefill_s"]
