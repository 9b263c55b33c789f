"""The door: what a client asks becomes requests that the engine can carry to their end, or an error at once."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable
from typing import SupportsIndex

from loongjax.core.cluster import ClusterShape
from loongjax.core.field_values import as_integer, as_integers
from loongjax.core.request import NO_SLO, Request, ServiceLevel
from loongjax.core.sampling import MAX_SEED, SamplingParams
from loongjax.engine.client import ModelInfo
from loongjax.errors import ConfigError, ContextLengthError, RequestError
from loongjax.runtime.protocol import RuntimeLimits


def admit(
    prompt_token_ids: Iterable[SupportsIndex],
    sampling: SamplingParams,
    *,
    request_id: str,
    info: ModelInfo,
    seeds: random.Random,
    priority: int = 0,
    slo: ServiceLevel = NO_SLO,
) -> tuple[Request, ...]:
    """One request for each of the `sampling.n` samples, with its limits, its seed and its stop tokens resolved.

    Args:
        prompt_token_ids: the prompt.
        sampling: what the client wants.
        request_id: unique among live ones; sample i becomes `request_id/i`.
        info: the model.
        seeds: gives the seed if the client names none.
        priority: lower goes first.
        slo: how soon the client wants its tokens.

    Raises:
        ContextLengthError: the prompt, or prompt and `max_tokens`, exceed `max_model_len`, or the prompt exceeds
            `max_whole_prompt_len` and cannot be cut.
        RequestError: an empty prompt, token ids that are no integers or outside the vocabulary, a priority that is no
            integer of 64 bits.
    """
    prompt = as_integers("prompt", prompt_token_ids)
    _check_token_ids(prompt, sampling, info.vocab_size)
    max_tokens = _resolve_max_tokens(len(prompt), sampling, info.max_model_len)
    _check_whole_prompt(len(prompt), sampling, info.max_whole_prompt_len)
    seed = seeds.getrandbits(63) if sampling.seed is None else sampling.seed
    priority = _check_priority(priority)
    stop_token_ids = frozenset(sampling.stop_token_ids)
    if not sampling.ignore_eos:
        stop_token_ids |= frozenset(info.eos_token_ids)
    return tuple(
        Request(
            request_id=f"{request_id}/{index}",
            prompt_token_ids=prompt,
            sampling=sampling,
            max_tokens=max_tokens,
            seed=sample_seed(seed, index),
            stop_token_ids=stop_token_ids,
            priority=priority,
            slo=slo,
        )
        for index in range(sampling.n)
    )


def check_capacity(info: ModelInfo, shape: ClusterShape, limits: RuntimeLimits) -> None:
    """Makes sure that the longest request can run alone, and be computed anew after a preemption just before its end.

    The last token of a request never gets keys, but it may be a prompt's, and is then prefilled.

    Raises:
        ConfigError: the pool holds less than a request of `info.max_model_len` tokens, or the largest prefill less than
            such a prompt or, if prompts are cut, one of `info.max_whole_prompt_len`.
    """
    num_slots = shape.num_instances * shape.num_slots
    num_batched_tokens = shape.num_instances * limits.max_num_batched_tokens
    if info.max_model_len > num_slots + 1:
        raise ConfigError(
            f"max_model_len is {info.max_model_len}, but all instances together hold the keys of {num_slots} tokens: "
            f"lower --max-model-len to {num_slots + 1}, or raise --num-slots"
        )
    longest_whole = info.max_model_len if info.max_whole_prompt_len is None else info.max_whole_prompt_len
    if longest_whole > num_batched_tokens:
        raise ConfigError(
            f"prompts may have {longest_whole} tokens, but all instances together prefill {num_batched_tokens}: "
            f"lower --max-model-len to {num_batched_tokens}, or raise --max-num-batched-tokens"
        )


def sample_seed(seed: int, index: int) -> int:
    """The seed of sample `index`: the request's own for the first, so that it is what n = 1 gives."""
    if index == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") & MAX_SEED


def _check_token_ids(prompt: tuple[int, ...], sampling: SamplingParams, vocab_size: int) -> None:
    if not prompt:
        raise RequestError("the prompt is empty: at least one token is needed", "prompt")
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        bad = next(token_id for token_id in prompt if not 0 <= token_id < vocab_size)
        raise RequestError(f"token ids must be from 0 to {vocab_size - 1}, got {bad}", "prompt")
    for token_id in sampling.logit_bias:
        if token_id >= vocab_size:
            raise RequestError(
                f"logit_bias: token ids must be from 0 to {vocab_size - 1}, got {token_id}", "logit_bias"
            )
    for token_id in sampling.stop_token_ids:
        if token_id >= vocab_size:
            raise RequestError(f"stop_token_ids must be from 0 to {vocab_size - 1}, got {token_id}", "stop_token_ids")


def _check_priority(priority: int) -> int:
    priority = as_integer("priority", priority)
    if not -(2**63) <= priority < 2**63:
        raise RequestError(f"priority must be from -2**63 to 2**63 - 1, got {str(priority)[:40]}", "priority")
    return priority


def _resolve_max_tokens(num_prompt_tokens: int, sampling: SamplingParams, max_model_len: int) -> int:
    if num_prompt_tokens > max_model_len:
        raise ContextLengthError(
            f"This model's maximum context length is {max_model_len} tokens, "
            f"but the prompt has {num_prompt_tokens}. Please shorten the prompt.",
            "prompt",
        )
    room = max_model_len - num_prompt_tokens
    if sampling.max_tokens is None:
        if room == 0 or room < sampling.min_tokens:
            raise ContextLengthError(
                f"This model's maximum context length is {max_model_len} tokens, and the prompt has "
                f"{num_prompt_tokens}: at least {max(sampling.min_tokens, 1)} must be left for the output. "
                "Please shorten the prompt.",
                "prompt",
            )
        return room
    if sampling.max_tokens > room:
        raise ContextLengthError(
            f"This model's maximum context length is {max_model_len} tokens. However, you requested "
            f"{num_prompt_tokens + sampling.max_tokens} tokens ({num_prompt_tokens} in the prompt, "
            f"{sampling.max_tokens} for the output). Please shorten the prompt or lower max_tokens.",
            "max_tokens",
        )
    return sampling.max_tokens


def _check_whole_prompt(num_prompt_tokens: int, sampling: SamplingParams, max_whole_prompt_len: int | None) -> None:
    if max_whole_prompt_len is None or num_prompt_tokens <= max_whole_prompt_len:
        return
    if sampling.prompt_logprobs is not None:
        reason, remedy = "whose log-probabilities are wanted", "do without prompt log-probabilities"
    elif sampling.max_tokens == 0:
        reason, remedy = "without output (max_tokens is 0)", "ask for a token"
    else:
        return
    raise ContextLengthError(
        f"A prompt {reason} is computed in one piece, of at most {max_whole_prompt_len} tokens, "
        f"but this one has {num_prompt_tokens}. Please shorten the prompt or {remedy}.",
        "prompt",
    )
