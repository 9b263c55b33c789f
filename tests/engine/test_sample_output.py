"""Events to deltas: text, stop strings and stop reasons."""

from __future__ import annotations

from typing import Any

from loongjax.core.request import FinishReason, Phase, RequestEvent, Timings, TokenLogprobs
from loongjax.engine.client import OutputDelta
from loongjax.engine.sample_output import SampleOutput
from tests.engine.cluster import Cluster
from tests.engine.fake_runtime import EOS
from tests.engine.hosted import LetterTokenizer

TOKENIZER = LetterTokenizer()
TIMINGS = Timings(queue_s=1.0, prefill_s=2.0, decode_s=3.0)
HISTORY = (Phase("prefill", (0,), (0,), 3),)


def sample(**sampling: Any) -> SampleOutput:
    request = Cluster().request("r", 3, 50, **({"ignore_eos": False} | sampling))
    return SampleOutput(2, request, TOKENIZER, frozenset({EOS}))


def event(text: str = "", **fields: Any) -> RequestEvent:
    return RequestEvent(request_id="r/0", token_ids=tuple(TOKENIZER.encode(text)), **fields)


def push(output: SampleOutput, item: RequestEvent) -> OutputDelta:
    delta = output.push(item)
    assert delta is not None
    return delta


def test_a_delta_carries_what_is_new() -> None:
    output = sample(logprobs=0)
    logprobs = (TokenLogprobs(49, -1.0, 1),)
    push(output, event("A", logprobs=logprobs))
    delta = push(output, event("B", logprobs=logprobs))
    assert (delta.index, delta.text, delta.token_ids, delta.logprobs) == (2, "B", (18,), logprobs)
    assert (delta.num_prompt_tokens, delta.num_output_tokens) == (3, 2)
    assert delta.finish_reason is None


def test_an_event_without_news_gives_no_delta() -> None:
    assert sample().push(event()) is None


def test_a_stop_string_ends_the_text_and_waits_for_the_engine() -> None:
    output = sample(stop=("CD",))
    assert push(output, event("AB")).text == "AB"
    assert push(output, event("C")).text == ""
    assert push(output, event("DE")).text == ""
    assert output.is_stopped
    assert output.push(event("F")) is None
    last = push(output, event(finish_reason=FinishReason.ABORT, history=HISTORY, timings=TIMINGS))
    assert (last.finish_reason, last.stop_reason) == (FinishReason.STOP, "CD")
    assert (last.history, last.timings) == (HISTORY, TIMINGS)
    assert last.num_output_tokens == 4, "tokens behind the stop string do not count"


def test_a_stop_string_in_the_last_event_wins_over_its_reason() -> None:
    output = sample(stop=("C",), include_stop_str_in_output=True)
    last = push(output, event("ABC", finish_reason=FinishReason.LENGTH))
    assert (last.text, last.finish_reason, last.stop_reason) == ("ABC", FinishReason.STOP, "C")


def test_text_held_back_goes_out_at_the_end() -> None:
    output = sample(stop=("CD",))
    last = push(output, event("ABC", finish_reason=FinishReason.LENGTH))
    assert (last.text, last.finish_reason, last.stop_reason) == ("ABC", FinishReason.LENGTH, None)


def test_a_stop_string_does_not_end_the_request_before_min_tokens() -> None:
    output = sample(stop=("A",), min_tokens=3)
    assert push(output, event("AAB")).text == "AAB"
    assert not output.is_stopped
    push(output, event("A"))
    assert output.is_stopped


def test_eos_is_not_text_and_gives_no_stop_reason() -> None:
    output = sample(skip_special_tokens=False)
    last = push(output, event("A0", finish_reason=FinishReason.STOP, stop_token_id=EOS))
    assert (last.text, last.token_ids, last.stop_reason) == ("A", (17, EOS), None)


def test_a_stop_token_is_the_stop_reason() -> None:
    last = push(sample(stop_token_ids=(18,)), event("AB", finish_reason=FinishReason.STOP, stop_token_id=18))
    assert (last.text, last.finish_reason, last.stop_reason) == ("A", FinishReason.STOP, 18)


def test_eos_as_a_stop_token_of_a_request_that_ignores_eos_is_the_stop_reason() -> None:
    output = sample(stop_token_ids=(EOS,), ignore_eos=True)
    last = push(output, event("A0", finish_reason=FinishReason.STOP, stop_token_id=EOS))
    assert last.stop_reason == EOS


def test_a_stop_token_can_stay_in_the_text() -> None:
    output = sample(stop_token_ids=(18,), include_stop_str_in_output=True)
    last = push(output, event("AB", finish_reason=FinishReason.STOP, stop_token_id=18))
    assert last.text == "AB"


def test_prompt_logprobs_and_errors_are_handed_on() -> None:
    logprobs = (TokenLogprobs(49, -1.0, 1),)
    output = sample(prompt_logprobs=0)
    assert push(output, event(prompt_logprobs=logprobs)).prompt_logprobs == logprobs
    last = push(output, event(finish_reason=FinishReason.ERROR, error="broken"))
    assert (last.finish_reason, last.error) == (FinishReason.ERROR, "broken")
