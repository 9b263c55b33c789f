"""What a second costs: the weights of normalised latency that gains and costs are summed with.

The paper sums latency / length: of a waiting request over its input length, of a running one over what it has
generated (equations 1 to 5). Here each term also has a factor for the request's priority and one for the pressure of
its deadline.

    prefill weight = 2^-priority x pressure(ttft) / input length
    decode weight  = 2^-priority x pressure(tpot) / generated tokens

Pressure is allowed time / time left, from 1 when nothing is used up yet, or without a wish, to MAX_PRESSURE. A first
token that is late already presses no more: its wish cannot be met, that of others can. A pace is an average and can be
mended, so it presses most when it is missed.
"""

from __future__ import annotations

from collections.abc import Iterable

from loongjax.core.request import NO_SLO
from loongjax.scheduler.view import RunningView, WaitingView

MAX_PRESSURE = 16.0
MAX_PRIORITY_STEPS = 32
"""Priorities are told apart in the weights up to this; the queue's order knows no bound."""


def prefill_weight(request: WaitingView, now_s: float) -> float:
    """What a second until a waiting request's next token costs."""
    weight = 1.0 / request.num_tokens
    if request.priority:
        weight *= priority_factor(request.priority)
    ttft_s = request.slo.ttft_s
    if ttft_s is not None and request.num_output_tokens == 0:
        waited_s = now_s - request.arrival_s
        if waited_s < ttft_s:
            weight *= _pressure(waited_s / ttft_s)
    return weight


def decode_weight(request: RunningView, now_s: float) -> float:
    """What a second until a running request's next token costs."""
    weight = 1.0 / max(1, request.num_output_tokens)
    if request.priority:
        weight *= priority_factor(request.priority)
    tpot_s = request.slo.tpot_s
    if tpot_s is not None and request.first_token_s is not None:
        allowed_s = tpot_s * max(1, request.num_output_tokens)
        weight *= _pressure((now_s - request.first_token_s) / allowed_s)
    return weight


def pause_weight(requests: Iterable[RunningView], now_s: float) -> float:
    """What a second in which these stand still costs."""
    return sum(
        [
            1.0 / (request.num_output_tokens or 1)
            if request.slo is NO_SLO and not request.priority
            else decode_weight(request, now_s)
            for request in requests
        ]
    )


def priority_factor(priority: int) -> float:
    """Each step of priority halves or doubles."""
    return 2.0 ** -min(max(priority, -MAX_PRIORITY_STEPS), MAX_PRIORITY_STEPS)


def _pressure(used: float) -> float:
    """1 / the share of the allowed time that is left, within 1 and MAX_PRESSURE."""
    return 1.0 / max(1.0 - max(used, 0.0), 1.0 / MAX_PRESSURE)
