"""From bodies to sampling parameters."""

from __future__ import annotations

from server_client import RunningServer
from server_fakes import VOCAB_SIZE

from loongjax.core.sampling import SamplingParams

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]


def sampling_of(server: RunningServer, path: str, **fields) -> SamplingParams:
    prompt = {"prompt": "a"} if path == COMPLETIONS else {"messages": HI}
    answer = server.post(path, {**prompt, **fields})
    assert answer.status == 200, answer.body
    return server.engine.calls[-1].sampling


def test_silence_means_the_defaults(server: RunningServer):
    assert sampling_of(server, COMPLETIONS) == SamplingParams(max_tokens=16)
    assert sampling_of(server, CHAT, max_tokens=3) == SamplingParams(max_tokens=3)


def test_every_field_reaches_the_engine(server: RunningServer):
    fields = {
        "max_tokens": 9,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "seed": -5,
        "presence_penalty": 0.25,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.5,
        "ignore_eos": True,
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "n": 2,
    }
    expected = SamplingParams(
        **fields, logit_bias={3: 1.0, 4: -100.0}, stop=("x", "y"), stop_token_ids=(8, 9), logprobs=3, prompt_logprobs=1
    )
    extra = {"logit_bias": {"3": 1, "4": -100}, "stop": ["x", "y"], "stop_token_ids": [8, 9], "prompt_logprobs": 1}
    assert sampling_of(server, COMPLETIONS, **fields, **extra, logprobs=3) == expected
    assert sampling_of(server, CHAT, **fields, **extra, logprobs=True, top_logprobs=3) == expected


def test_whole_numbers_are_numbers(server: RunningServer):
    sampling = sampling_of(server, COMPLETIONS, temperature=0, top_p=1, repetition_penalty=1)
    assert sampling.is_greedy
    assert not sampling.has_penalties


def test_the_models_defaults_hold_where_the_client_is_silent(server: RunningServer):
    server.engine.default_sampling = {"temperature": 0.6, "top_p": 0.9, "top_k": 50}
    sampling = sampling_of(server, COMPLETIONS, top_p=0.5, top_k=None)
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.6, 0.5, 50)


def test_a_top_k_beyond_the_vocabulary_is_the_vocabulary(server: RunningServer):
    assert sampling_of(server, COMPLETIONS, top_k=2**62).top_k == VOCAB_SIZE
    assert sampling_of(server, COMPLETIONS, top_k=-1).top_k == 0


def test_chat_logprobs_alone_ask_for_no_alternatives(server: RunningServer):
    assert sampling_of(server, CHAT, max_tokens=1, logprobs=True).logprobs == 0
    assert sampling_of(server, CHAT, max_tokens=1, logprobs=False, top_logprobs=0).logprobs is None


def test_echo_with_logprobs_scores_the_prompt(server: RunningServer):
    assert sampling_of(server, COMPLETIONS, echo=True, logprobs=1).prompt_logprobs == 1
    assert sampling_of(server, COMPLETIONS, echo=True).prompt_logprobs is None
