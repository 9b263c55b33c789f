"""What a second of waiting or of standing still weighs."""

from __future__ import annotations

import pytest

from loongjax.core.request import ServiceLevel
from loongjax.scheduler.esp.objective import MAX_PRESSURE, decode_weight, pause_weight, prefill_weight
from tests.scheduler.views import running, waiting


def test_a_waiting_request_weighs_one_over_its_length() -> None:
    assert prefill_weight(waiting("w", 0, 50), 3.0) == pytest.approx(1 / 50)


def test_a_running_request_weighs_one_over_what_it_has_generated() -> None:
    assert decode_weight(running("r", 0, (0, 50), num_output_tokens=8), 3.0) == pytest.approx(1 / 8)


@pytest.mark.parametrize(("priority", "factor"), [(0, 1.0), (1, 0.5), (3, 0.125), (-2, 4.0), (10**6, 2.0**-32)])
def test_each_step_of_priority_halves_or_doubles(priority: int, factor: float) -> None:
    assert prefill_weight(waiting("w", 0, 50, priority=priority), 0.0) == pytest.approx(factor / 50)
    request = running("r", 0, (0, 50), num_output_tokens=8, priority=priority)
    assert decode_weight(request, 0.0) == pytest.approx(factor / 8)


@pytest.mark.parametrize(
    ("waited_s", "pressure"), [(0.0, 1.0), (5.0, 2.0), (7.5, 4.0), (9.9, MAX_PRESSURE), (10.0, 1.0), (99.0, 1.0)]
)
def test_a_deadline_presses_the_more_the_nearer_it_is_until_it_is_missed(waited_s: float, pressure: float) -> None:
    request = waiting("w", 0, 50, arrival_s=100.0, slo=ServiceLevel(ttft_s=10.0))
    assert prefill_weight(request, 100.0 + waited_s) == pytest.approx(pressure / 50)


@pytest.mark.parametrize(("elapsed_s", "pressure"), [(0.0, 1.0), (4.0, 2.0), (6.0, 4.0), (8.0, 16.0), (80.0, 16.0)])
def test_a_pace_presses_the_more_the_slower_it_has_been(elapsed_s: float, pressure: float) -> None:
    """8 tokens at a second each."""
    slo = ServiceLevel(tpot_s=1.0)
    request = running("r", 0, (0, 50), num_output_tokens=8, first_token_s=100.0, slo=slo)
    assert decode_weight(request, 100.0 + elapsed_s) == pytest.approx(pressure / 8)


def test_a_group_weighs_what_its_requests_weigh() -> None:
    requests = [
        running("a", 0, (0, 50), num_output_tokens=4),
        running("b", 1, (0, 50), num_output_tokens=5, priority=1),
        running("c", 2, (0, 50), num_output_tokens=2, first_token_s=0.0, slo=ServiceLevel(tpot_s=1.0)),
        running("d", 3, (0, 50)),
    ]
    assert pause_weight(requests, 1.0) == pytest.approx(sum(decode_weight(request, 1.0) for request in requests))
    assert pause_weight(requests, 1.0) == pytest.approx(1 / 4 + 1 / 10 + 2 / 2 + 1)
