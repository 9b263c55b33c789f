"""What a second costs: the weights of normalised latency that gains and costs are summed with.

The paper sums latency / length: of a waiting request over its input length, of a running one over what it has
generated so far (equations 1 to 5). What counts in the end is the latency over the whole output, so here a running one
weighs the mean of 1 / output length, as far as that can be known. A request that brings wishes is measured by them
instead: by its share of what is allowed, the time to first token or `tpot` times the output length.

    prefill weight = 2^-priority x TOKEN_S x pressure / ttft
    decode weight  = 2^-priority x E[1 / output length] x TOKEN_S x pressure / tpot

Who wishes for no tpot has an implied one, without pressure: if it were as short as decodes are fast, they would be
paused so rarely that they stay few, while prompts queue up. Who wishes for no ttft weighs 2^-priority / input length,
as in the paper, or as for an implied ttft without pressure, whichever is more. By the former alone a prompt of 2,000
tokens that waits weighs a tenth of one decode of 200: under load most of such prompts would wait for seconds, since
decodes would not be paused for the tenth of a second that they need.

Pressure is allowed time / time left, from 1 to MAX_PRESSURE, where time left is what is allowed, less what has passed
and what the rest of the output needs. What is late presses no more: its wish cannot be met, that of others can.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from loongjax.costmodel.work import larger
from loongjax.scheduler.esp.output_lengths import OutputLengths
from loongjax.scheduler.request_view import RunningView, WaitingView
from loongjax.scheduler.running import Running
from loongjax.scheduler.waiting import ARRIVAL_S, NUM_TOKENS, PRIORITY, TTFT_S, Waiting

TOKEN_S = 0.05
"""What a request without wishes is taken to wish for, in seconds a token, where it is weighed against one with them."""
IMPLIED_TTFT_TOKENS = 640
"""Prompts of up to so many tokens are all taken to wish for the same time to their first token, longer ones for one in
proportion."""
MAX_PRESSURE = 16.0
MAX_PRIORITY_STEPS = 32
"""Priorities are told apart in the weights up to this; the queue's order knows no bound."""


class PrefillWeights:
    """What a second until their next token costs waiting requests, at any time: `prefill_weight` of each, and pressure.

    Args:
        requests: they wait.
        implied_ttft_s: what a short prompt without a wish is taken to wish for; inf: nothing.
    """

    def __init__(self, requests: Waiting, implied_ttft_s: float = math.inf) -> None:
        lens, priorities, ttfts_s = requests.table.take((NUM_TOKENS, PRIORITY, TTFT_S), axis=0)
        self._weights = _weight_without_wish(lens, implied_ttft_s)
        """Without pressure."""
        self.are_steady = not np.isfinite(ttfts_s).any()
        """Whether they do not depend on the time."""
        if not self.are_steady:
            self._weights = np.where(np.isfinite(ttfts_s), TOKEN_S / ttfts_s, self._weights)
        if priorities.any():
            self._weights *= priority_factors(priorities)
        if not self.are_steady:
            self._arrivals_s = requests.table[ARRIVAL_S]
            self._ttfts_s = ttfts_s
            self._late_weights = np.minimum(self._weights, priority_factors(priorities) / lens)
            """Once what is wished for cannot be met."""

    def at(self, now_s: float) -> Float[np.ndarray, " requests"]:
        """By the engine's clock. Shared: not to be written to."""
        if self.are_steady:
            return self._weights
        used = (now_s - self._arrivals_s) / self._ttfts_s
        pressures = 1.0 / np.minimum(np.maximum(1.0 - used, 1.0 / MAX_PRESSURE), 1.0)
        return np.where(used < 1.0, self._weights * pressures, self._late_weights)


def prefill_weight(request: WaitingView, implied_ttft_s: float = math.inf) -> float:
    """What a second until a waiting request's next token costs, without pressure: when it arrives.

    Args:
        request: it waits.
        implied_ttft_s: what a short prompt without a wish is taken to wish for; inf: nothing.
    """
    length = request.num_tokens
    ttft_s = request.slo.ttft_s
    if ttft_s is not None and request.num_output_tokens == 0:
        weight = TOKEN_S / ttft_s
    else:
        weight = _weight_without_wish(float(length), implied_ttft_s)
    return weight * priority_factor(request.priority) if request.priority else weight


def _weight_without_wish[Real: (float, np.ndarray)](length: Real, implied_ttft_s: float) -> Real:
    """Of prompts of these lengths."""
    return larger(1.0 / length, TOKEN_S / (implied_ttft_s * larger(length / IMPLIED_TTFT_TOKENS, 1.0)))


def decode_weights(
    requests: Running,
    now_s: float,
    lengths: OutputLengths,
    step_s: float = 0.0,
    implied_tpot_s: float = TOKEN_S,
) -> list[float]:
    """What a second until its next token costs each running request.

    Args:
        requests: they decode.
        now_s: the engine's clock.
        lengths: of outputs that have ended.
        step_s: what each further token takes at least.
        implied_tpot_s: what a request without a wish is taken to wish for.
    """
    if requests.are_plain:
        return plain_decode_weights(*requests.outputs, lengths, implied_tpot_s)
    reciprocals = lengths.expected_reciprocals(*requests.outputs)
    urgencies = _urgencies(requests, now_s, reciprocals, step_s, implied_tpot_s)
    return list(map(operator.mul, reciprocals, urgencies))


def plain_decode_weights(
    num_outputs: Sequence[int], max_outputs: Sequence[int], lengths: OutputLengths, implied_tpot_s: float
) -> list[float]:
    """As `decode_weights`, of requests without priorities or wishes for their pace, by their `Running.outputs`."""
    urgency = TOKEN_S / implied_tpot_s
    return [urgency * reciprocal for reciprocal in lengths.expected_reciprocals(num_outputs, max_outputs)]


def step_weights(
    requests: Running,
    now_s: float,
    lengths: OutputLengths,
    step_s: float = 0.0,
    implied_tpot_s: float = TOKEN_S,
) -> list[float]:
    """What it costs each running request if all its further tokens take a second longer each.

    That is weight x tokens left, of which the mean over the lengths that its output may have is
    E[1 / output length x (output length - tokens so far)]. The arguments are those of `decode_weights`.
    """
    num_outputs, max_outputs = requests.outputs
    reciprocals = lengths.expected_reciprocals(num_outputs, max_outputs)
    urgencies = _urgencies(requests, now_s, reciprocals, step_s, implied_tpot_s)
    return [
        urgency * (1.0 - generated * reciprocal)
        for generated, reciprocal, urgency in zip(num_outputs, reciprocals, urgencies, strict=True)
    ]


def _urgencies(
    requests: Running, now_s: float, reciprocals: Sequence[float], step_s: float, implied_tpot_s: float
) -> list[float]:
    """Decode weight over 1 / output length of each."""
    implied = TOKEN_S / implied_tpot_s
    if requests.are_plain:
        return [implied] * len(requests)
    urgencies: list[float] = []
    for request, reciprocal in zip(requests, reciprocals, strict=True):
        urgency = implied if request.slo.tpot_s is None else _urgency_of_wish(request, now_s, reciprocal, step_s)
        urgencies.append(urgency * priority_factor(request.priority) if request.priority else urgency)
    return urgencies


def _urgency_of_wish(request: RunningView, now_s: float, reciprocal: float, step_s: float) -> float:
    """Of a request with a wish for its pace, and with so long an output."""
    tpot_s = request.slo.tpot_s
    assert tpot_s is not None
    if request.first_token_s is None:
        return TOKEN_S / tpot_s
    left_s = (1.0 / reciprocal - request.num_output_tokens) * min(step_s, tpot_s)
    used = (now_s - request.first_token_s + left_s) * reciprocal / tpot_s
    return TOKEN_S / tpot_s * (_pressure(used) if used < 1.0 else 1.0)


def priority_factor(priority: int) -> float:
    """Each step of priority halves or doubles."""
    return 2.0 ** -min(max(priority, -MAX_PRIORITY_STEPS), MAX_PRIORITY_STEPS)


def priority_factors(priorities: Float[np.ndarray, " requests"]) -> Float[np.ndarray, " requests"]:
    """Of many."""
    return np.exp2(-priorities.clip(-MAX_PRIORITY_STEPS, MAX_PRIORITY_STEPS))


def _pressure(used: float) -> float:
    """1 / the share of the allowed time that is left, within 1 and MAX_PRESSURE."""
    return 1.0 / max(1.0 - max(used, 0.0), 1.0 / MAX_PRESSURE)
