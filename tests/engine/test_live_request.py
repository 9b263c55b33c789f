"""What the engine keeps of a request: its history merges what continues, its view is made anew when it has to be."""

from __future__ import annotations

import numpy as np
import pytest

from loongjax.core.request import Phase
from loongjax.engine.live_request import LiveRequest
from tests.engine.cluster import Cluster

PREFILL = Phase("prefill", (0, 1), (0,), 8)
DECODE = Phase("decode", (0,), (0,), 1)


def live() -> LiveRequest:
    return LiveRequest(Cluster().request("a", 8, 20), 3, 0.0)


def test_steps_of_one_decode_are_one_phase() -> None:
    request = live()
    for phase in (PREFILL, DECODE, DECODE, DECODE):
        request.record(phase)
    assert request.history == (PREFILL, Phase("decode", (0,), (0,), 3))


def test_chunks_of_one_prompt_are_one_phase() -> None:
    request = live()
    for num_tokens in (4, 4, 2):
        request.record(Phase("extend", (0,), (0,), num_tokens))
    request.record(DECODE)
    assert request.history == (Phase("extend", (0,), (0,), 10), DECODE)


def test_a_view_tells_how_much_of_a_prompt_is_left() -> None:
    request = live()
    assert request.running_view(((0, 3),)).num_uncomputed_tokens == 5
    assert request.running_view(((0, 7),)).num_uncomputed_tokens == 1
    assert request.running_view(((0, 8),)).num_uncomputed_tokens == 1
    request.output_token_ids += [1, 2]
    assert request.running_view(((0, 4),)).num_uncomputed_tokens == 6
    assert request.running_view(((0, 9),)).num_uncomputed_tokens == 1


@pytest.mark.parametrize(("begin", "end"), [(0, 8), (2, 5), (5, 10), (8, 11), (9, 10), (10, 11)])
def test_the_tokens_between_two_positions_are_those_of_prompt_and_output(begin: int, end: int) -> None:
    request = live()
    request.output_token_ids += [101, 102, 103]
    tokens = request.tokens_between(begin, end)
    assert tokens.tolist() == [*request.request.prompt_token_ids, 101, 102, 103][begin:end]
    assert tokens.dtype == np.int32


def test_a_prompt_that_is_to_be_scored_or_leads_to_nothing_is_not_cut() -> None:
    def waiting(**sampling: int) -> bool:
        request = Cluster().request("a", 8, sampling.pop("max_tokens", 4), **sampling)
        return LiveRequest(request, 0, 0.0).waiting_view().needs_whole_prefill

    assert not waiting()
    assert waiting(prompt_logprobs=0)
    assert waiting(max_tokens=0)


def test_a_request_is_a_suspect_until_it_gets_a_token() -> None:
    request = live()
    kv = ((0, 4),)
    assert not request.running_view(kv).is_suspect
    request.num_failures = 1
    assert request.waiting_view().is_suspect
    assert request.running_view(kv).is_suspect
    assert not request.running_view(kv, num_landed=1, num_given=1).is_suspect
    request.num_failures = 0
    assert not request.running_view(kv).is_suspect


def test_reading_the_history_changes_nothing() -> None:
    request = live()
    for num_tokens in (1, 2, 3):
        request.record(DECODE)
        assert request.history == request.history == (Phase("decode", (0,), (0,), num_tokens),)


def test_another_group_or_other_masters_begin_a_phase() -> None:
    phases = [
        DECODE,
        Phase("decode", (0, 1), (0,), 1),
        Phase("decode", (0, 1), (0, 1), 1),
        Phase("migrate", (0, 1), (0,), 5),
        Phase("migrate", (0, 1), (0,), 5),
        Phase("prefill", (0, 1), (0, 1), 5),
        Phase("decode", (0, 1), (0, 1), 1),
    ]
    request = live()
    for phase in phases:
        request.record(phase)
        if phase.kind == "decode":
            request.record(phase)
    assert [(phase.kind, phase.num_tokens) for phase in request.history] == [
        ("decode", 2),
        ("decode", 2),
        ("decode", 2),
        ("migrate", 5),
        ("migrate", 5),
        ("prefill", 5),
        ("decode", 2),
    ]


def test_a_recorded_phase_is_not_changed_by_what_continues_it() -> None:
    first, second = live(), live()
    for request in (first, second, first):
        request.record(DECODE)
    assert [phase.num_tokens for phase in first.history] == [2]
    assert [phase.num_tokens for phase in second.history] == [1]


def test_a_view_is_used_again_until_the_keys_or_the_flight_change() -> None:
    request = live()
    kv = ((1, 8), (0, 2))
    view = request.running_view(kv)
    assert (view.request_id, view.order, view.num_tokens, view.max_total_tokens) == ("a/0", 3, 10, 28)
    assert (view.kv, view.is_in_flight, view.num_output_tokens) == (kv, False, 0)
    assert request.running_view(kv) is view
    request.num_in_flight = 1
    assert request.running_view(kv).is_in_flight
    assert request.running_view(((1, 8), (0, 3))).num_tokens == 11


def test_the_longest_output_is_the_same_at_rest_in_flight_and_before_the_prompt_is_computed() -> None:
    request = live()
    assert [request.running_view(((0, num_held),)).max_output_tokens for num_held in (2, 7)] == [20, 20]
    request.output_token_ids += [1, 2]
    assert request.running_view(((0, 9),)).max_output_tokens == 20
    request.num_in_flight = 1
    assert request.running_view(((0, 10),)).max_output_tokens == 20
    request.num_in_flight = 2
    assert request.running_view(((0, 11),)).max_output_tokens == 19


def test_a_step_that_counts_as_over_has_given_its_token() -> None:
    request = live()
    request.num_in_flight = 1
    view = request.running_view(((0, 8),), num_landed=1, num_given=1)
    assert (view.is_in_flight, view.num_output_tokens) == (False, 1)
