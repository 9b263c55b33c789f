"""What a second of waiting or of standing still weighs."""

from __future__ import annotations

import dataclasses

import pytest

from loongjax.core.request import ServiceLevel
from loongjax.scheduler.esp.objective import (
    MAX_PRESSURE,
    TOKEN_S,
    PrefillWeights,
    decode_weights,
    prefill_weight,
    step_weights,
)
from loongjax.scheduler.esp.output_lengths import OutputLengths
from loongjax.scheduler.request_view import RunningView
from loongjax.scheduler.running import Running
from loongjax.scheduler.waiting import Waiting
from tests.scheduler.views import running, waiting


def lengths_of(*outputs: int) -> OutputLengths:
    lengths = OutputLengths()
    for output in outputs:
        lengths.add(output)
    return lengths


def decode_weight(request: RunningView, now_s: float, lengths: OutputLengths | None = None) -> float:
    (weight,) = decode_weights(Running([request]), now_s, lengths or OutputLengths())
    return weight


def test_a_waiting_request_weighs_one_over_its_length() -> None:
    assert prefill_weight(waiting("w", 0, 50)) == pytest.approx(1 / 50)


@pytest.mark.parametrize(
    ("num_tokens", "weight"), [(20, 1 / 20), (80, 1 / 80), (100, 0.05 / 4), (640, 0.05 / 4), (6400, 0.05 / 40)]
)
def test_a_prompt_without_a_wish_is_taken_to_wish_for_a_time_to_its_first_token(num_tokens: int, weight: float) -> None:
    assert prefill_weight(waiting("w", 0, num_tokens), 4.0) == pytest.approx(weight)
    assert prefill_weight(waiting("w", 0, num_tokens, priority=1), 4.0) == pytest.approx(weight / 2)


@pytest.mark.parametrize("num_output_tokens", [1, 8, 500])
def test_a_running_request_weighs_one_over_its_output_that_is_taken_to_be_half_way(num_output_tokens: int) -> None:
    request = running("r", 0, (0, 50), num_output_tokens=num_output_tokens)
    assert decode_weight(request, 3.0) == pytest.approx(1 / (2 * num_output_tokens))


def test_a_decode_without_a_wish_is_taken_to_wish_for_a_time_a_token() -> None:
    wishing = ServiceLevel(tpot_s=0.2)
    requests = [
        running("a", 0, (0, 50), num_output_tokens=8),
        running("b", 1, (0, 50), num_output_tokens=8, priority=1),
        running("c", 2, (0, 50), num_output_tokens=8, first_token_s=3.0, slo=wishing),
    ]
    weights = decode_weights(Running(requests), 3.0, OutputLengths(), implied_tpot_s=0.2)
    # Who says so weighs the same, as long as there is time.
    assert weights == pytest.approx([0.25 / 16, 0.25 / 32, 0.25 / 16])


def test_of_outputs_that_have_ended_the_longer_ones_say_how_long_it_will_be() -> None:
    """8 are out: 10, 40 and 160 are possible, which a limit of 50 makes 10, 40 and 50."""
    lengths = lengths_of(2, 8, 10, 40, 160)
    request = running("r", 0, (0, 50), num_output_tokens=8)
    assert decode_weight(request, 3.0, lengths) == pytest.approx((1 / 10 + 1 / 40 + 1 / 160) / 3)
    limited = running("r", 0, (0, 50), num_output_tokens=8, max_new_tokens=42)
    assert decode_weight(limited, 3.0, lengths) == pytest.approx((1 / 10 + 1 / 40 + 1 / 50) / 3)


def test_a_long_output_is_cheap_to_pause_from_its_first_token_on() -> None:
    """Equation 1 of the paper has 1 / 1 for both."""
    lengths = lengths_of(*[400] * 20)
    young = running("young", 0, (0, 50), num_output_tokens=1)
    short = running("short", 1, (0, 50), num_output_tokens=1, max_new_tokens=1)
    assert decode_weight(young, 3.0, lengths) == pytest.approx(1 / 400)
    assert decode_weight(short, 3.0, lengths) == pytest.approx(1 / 2)


@pytest.mark.parametrize(
    ("priority", "factor"), [(0, 1.0), (1, 0.5), (3, 0.125), (-2, 4.0), (10**6, 2.0**-32), (-(10**6), 2.0**32)]
)
def test_each_step_of_priority_halves_or_doubles(priority: int, factor: float) -> None:
    assert prefill_weight(waiting("w", 0, 50, priority=priority)) == pytest.approx(factor / 50)
    request = running("r", 0, (0, 50), num_output_tokens=8, priority=priority)
    assert decode_weight(request, 0.0) == pytest.approx(factor / 16)


@pytest.mark.parametrize(
    ("waited_s", "pressure"), [(-5.0, 1.0), (0.0, 1.0), (5.0, 2.0), (7.5, 4.0), (9.9, MAX_PRESSURE)]
)
@pytest.mark.parametrize("num_tokens", [5, 50, 50_000])
def test_whoever_wishes_for_a_time_is_measured_by_that_time(num_tokens: int, waited_s: float, pressure: float) -> None:
    """And presses the more the nearer it is."""
    request = waiting("w", 0, num_tokens, arrival_s=100.0, slo=ServiceLevel(ttft_s=10.0))
    assert PrefillWeights(Waiting([request])).at(100.0 + waited_s) == pytest.approx(pressure * TOKEN_S / 10.0)


@pytest.mark.parametrize(("num_tokens", "weight"), [(5, TOKEN_S / 10.0), (50_000, 1 / 50_000)])
def test_a_deadline_that_is_missed_presses_no_more(num_tokens: int, weight: float) -> None:
    request = waiting("w", 0, num_tokens, arrival_s=100.0, slo=ServiceLevel(ttft_s=10.0))
    assert PrefillWeights(Waiting([request])).at(110.0) == pytest.approx(weight)


def test_a_wish_for_the_first_token_is_over_once_that_has_come() -> None:
    """It was preempted since."""
    request = waiting("w", 0, 50, arrival_s=100.0, slo=ServiceLevel(ttft_s=10.0))
    preempted = dataclasses.replace(request, num_output_tokens=3)
    assert prefill_weight(preempted) == pytest.approx(1 / 50)
    assert PrefillWeights(Waiting([preempted])).at(109.0) == pytest.approx(1 / 50)


@pytest.mark.parametrize(
    ("elapsed_s", "pressure"),
    [(-20.0, 1.0), (0.0, 1 / (1 - 8 / 32)), (8.0, 2.0), (16.0, 4.0), (23.9, 16.0), (24.0, 1.0)],
)
def test_a_pace_presses_the_more_the_less_time_is_left_beside_what_the_output_needs(
    elapsed_s: float, pressure: float
) -> None:
    """8 tokens of 16, which may take 32 s; the other 8 need 8 s. Once that is too long, nothing mends it."""
    request = running("r", 0, (0, 50), num_output_tokens=8, first_token_s=100.0, slo=ServiceLevel(tpot_s=2.0))
    (weight,) = decode_weights(Running([request]), 100.0 + elapsed_s, OutputLengths(), step_s=1.0)
    assert weight == pytest.approx(pressure * TOKEN_S / 2.0 / 16)


@pytest.mark.parametrize(
    ("step_s", "pressure"), [(0.0, 8 / 7), (1.0, 80 / 38), (1.5, 80 / 22), (2.0, 80 / 6), (100.0, 80 / 6)]
)
def test_a_pace_presses_by_what_the_rest_of_the_output_needs_but_no_more_than_it_allows(
    step_s: float, pressure: float
) -> None:
    """8 tokens of 40 came in 10 s of the 80 that all may take; the other 32 need a step each, of 2 s at most."""
    request = running("r", 0, (0, 50), num_output_tokens=8, first_token_s=100.0, slo=ServiceLevel(tpot_s=2.0))
    (weight,) = decode_weights(Running([request]), 110.0, lengths_of(40), step_s)
    assert weight == pytest.approx(pressure * TOKEN_S / 2.0 / 40)


def test_unless_more_is_said_the_rest_of_an_output_needs_no_time() -> None:
    """8 tokens of 40, which may take 80 s, in 20 s."""
    request = running("r", 0, (0, 50), num_output_tokens=8, first_token_s=100.0, slo=ServiceLevel(tpot_s=2.0))
    (weight,) = decode_weights(Running([request]), 120.0, lengths_of(40))
    assert weight == pytest.approx(TOKEN_S / (2.0 * 40) / (1 - 20 / 80))
    (weight,) = step_weights(Running([request]), 120.0, lengths_of(40))
    assert weight == pytest.approx(TOKEN_S / (2.0 * 40) / (1 - 20 / 80) * 32)


def test_a_pace_does_not_press_before_the_first_token() -> None:
    request = running("r", 0, (0, 50), slo=ServiceLevel(tpot_s=0.2))
    (weight,) = decode_weights(Running([request]), 1e6, lengths_of(40))
    assert weight == pytest.approx(TOKEN_S / 0.2 / 40)


def test_requests_weigh_what_each_weighs_alone() -> None:
    requests = [
        running("a", 0, (0, 50), num_output_tokens=4),
        running("b", 1, (0, 50), num_output_tokens=5, priority=1),
        running("c", 2, (0, 50), num_output_tokens=2, first_token_s=0.0, slo=ServiceLevel(tpot_s=1.0)),
        running("d", 3, (0, 50)),
    ]
    lengths = lengths_of(3, 30, 300)
    assert decode_weights(Running(requests), 1.0, lengths) == pytest.approx(
        [decode_weight(request, 1.0, lengths) for request in requests]
    )


def test_longer_steps_cost_a_request_its_weight_for_each_token_that_is_left() -> None:
    """8 are out: 10, 40 and 160 are possible, so the shares that are left are 2 / 10, 32 / 40 and 152 / 160."""
    left = (2 / 10 + 32 / 40 + 152 / 160) / 3
    requests = [
        running("a", 0, (0, 50), num_output_tokens=8),
        running("b", 1, (0, 50), num_output_tokens=8, priority=1),
        running("c", 2, (0, 50), num_output_tokens=8, first_token_s=3.0, slo=ServiceLevel(tpot_s=0.1)),
        running("d", 3, (0, 50)),
    ]
    weights = step_weights(Running(requests), 3.0, lengths_of(2, 8, 10, 40, 160), step_s=0.0, implied_tpot_s=0.2)
    assert weights == pytest.approx([left / 4, left / 8, left / 2, 1 / 4])


def test_weights_of_many_are_those_of_each_without_pressure_when_they_arrive() -> None:
    wishing = ServiceLevel(ttft_s=10.0)
    requests = [
        waiting("calm", 0, 700, arrival_s=3.0),
        waiting("urgent", 1, 50, arrival_s=3.0, priority=-2),
        waiting("wishing", 2, 50, arrival_s=3.0, slo=wishing, priority=1),
    ]
    weights = PrefillWeights(Waiting(requests), 4.0)
    assert not weights.are_steady
    assert PrefillWeights(Waiting(requests[:2]), 4.0).are_steady
    assert weights.at(3.0).tolist() == [prefill_weight(request, 4.0) for request in requests]
    # Half of the time is used up.
    assert weights.at(8.0).tolist() == [prefill_weight(requests[0], 4.0), prefill_weight(requests[1], 4.0), 0.005]
