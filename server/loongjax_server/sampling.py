"""From a request's body to sampling parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from loongjax.core.sampling import SamplingParams
from loongjax.engine.client import ModelInfo
from loongjax.errors import RequestError
from loongjax_server.schemas import ChatBody, CompletionBody, GenerationBody

DEFAULT_COMPLETION_TOKENS = 16
MAX_N = 128

_COPIED_FIELDS = (
    "n",
    "temperature",
    "top_p",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "min_tokens",
    "ignore_eos",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "prompt_logprobs",
)
_TOKEN_ID = re.compile(r"[0-9]{1,10}")


def completion_sampling(body: CompletionBody, info: ModelInfo) -> SamplingParams:
    """Sampling parameters of a completion. Raises RequestError."""
    fields = _shared_fields(body, info)
    fields["max_tokens"] = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    fields["logprobs"] = body.logprobs
    if body.echo and body.logprobs is not None and body.prompt_logprobs is None:
        fields["prompt_logprobs"] = body.logprobs
    return SamplingParams(**fields)


def chat_sampling(body: ChatBody, info: ModelInfo) -> SamplingParams:
    """Sampling parameters of a chat completion, whose output may fill the context. Raises RequestError."""
    fields, sent_as = _shared_fields(body, info), {"logprobs": "top_logprobs"}
    fields["max_tokens"] = body.max_tokens
    if body.max_completion_tokens is not None:
        fields["max_tokens"], sent_as["max_tokens"] = body.max_completion_tokens, "max_completion_tokens"
    if body.logprobs:
        fields["logprobs"] = body.top_logprobs or 0
    elif body.top_logprobs:
        raise RequestError("top_logprobs needs logprobs to be true", "top_logprobs")
    try:
        return SamplingParams(**fields)
    except RequestError as error:
        ours = error.param or ""
        if ours not in sent_as:
            raise
        raise RequestError(error.message.replace(ours, sent_as[ours], 1), sent_as[ours]) from None


def _shared_fields(body: GenerationBody, info: ModelInfo) -> dict[str, Any]:
    """Keyword arguments of SamplingParams: the client's values over the model's defaults."""
    fields: dict[str, Any] = dict(info.default_sampling)
    fields.update((name, value) for name in _COPIED_FIELDS if (value := getattr(body, name)) is not None)
    if body.top_k is not None:
        fields["top_k"] = min(body.top_k, info.vocab_size)
    if fields.get("n", 1) > MAX_N:
        raise RequestError(f"n must be at most {MAX_N}, got {fields['n']}", "n")
    if body.stop is not None:
        fields["stop"] = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
    if body.stop_token_ids is not None:
        for token_id in body.stop_token_ids:
            _check_token_id(token_id, info.vocab_size, "stop_token_ids")
        fields["stop_token_ids"] = tuple(body.stop_token_ids)
    if body.logit_bias is not None:
        fields["logit_bias"] = _logit_bias(body.logit_bias, info.vocab_size)
    if body.stream and body.prompt_logprobs is not None:
        raise RequestError("prompt_logprobs is not available in a stream", "prompt_logprobs")
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options needs stream to be true", "stream_options")
    return fields


def _logit_bias(logit_bias: Mapping[str, float], vocab_size: int) -> dict[int, float]:
    biases: dict[int, float] = {}
    for key, bias in logit_bias.items():
        if not _TOKEN_ID.fullmatch(key):
            raise RequestError(f"logit_bias maps token ids to numbers, got the key {key[:100]!r}", "logit_bias")
        _check_token_id(int(key), vocab_size, "logit_bias")
        biases[int(key)] = bias
    return biases


def _check_token_id(token_id: int, vocab_size: int, param: str) -> None:
    if not 0 <= token_id < vocab_size:
        raise RequestError(f"{param}: token ids are from 0 to {vocab_size - 1}, got {token_id}", param)
