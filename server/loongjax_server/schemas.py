"""Bodies of requests. Types are strict: JSON's false is not a temperature, and 1.5 is not a count.

Null means absent everywhere. Unknown fields are kept apart, so that they can be refused or warned about.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]

MAX_NUM_STOPS = 4
MAX_NUM_LISTED = 1024
"""Most entries of `stop_token_ids` and `logit_bias`."""


def _check_prompt(value: Any) -> Any:
    # One pass over the types in C: a pydantic union would try every element of a million ids against every branch.
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        kinds = set(map(type, value))
        if kinds == {str} or kinds == {int}:
            return value
        if kinds == {list} and all(set(map(type, token_ids)) == {int} for token_ids in value):
            return value
    raise PydanticCustomError(
        "prompt_type", "expected a string, a list of strings, a list of token ids, or a list of lists of token ids"
    )


def _check_token_ids(value: Any) -> Any:
    if isinstance(value, list) and set(map(type, value)) <= {int}:
        return value
    raise PydanticCustomError("token_ids_type", "expected a list of token ids")


def _check_stop(value: Any) -> Any:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and len(value) <= MAX_NUM_STOPS and set(map(type, value)) <= {str}:
        return value
    message = "expected a string, or a list of at most {max_num_stops} strings"
    raise PydanticCustomError("stop_type", message, {"max_num_stops": MAX_NUM_STOPS})


_TOKEN_IDS_SCHEMA = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        {**_TOKEN_IDS_SCHEMA, "minItems": 1},
        {"type": "array", "items": {**_TOKEN_IDS_SCHEMA, "minItems": 1}, "minItems": 1},
    ]
}
Prompt = Annotated[Any, AfterValidator(_check_prompt), WithJsonSchema(_PROMPT_SCHEMA)]
"""str | list[str] | list[int] | list[list[int]], not empty."""
TokenIds = Annotated[Any, AfterValidator(_check_token_ids), WithJsonSchema(_TOKEN_IDS_SCHEMA)]
"""list[int]"""
_STOP_SCHEMA = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "maxItems": MAX_NUM_STOPS}]
}
Stop = Annotated[Any, AfterValidator(_check_stop), WithJsonSchema(_STOP_SCHEMA)]
"""str | list[str]"""


class Body(BaseModel):
    """What every request may carry."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    model: str | None = None


class StreamOptions(BaseModel):
    """Which usage records a stream carries."""

    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationBody(Body):
    """What completions and chat completions share."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Int64 | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int64 | None = None
    min_p: float | None = None
    seed: Int64 | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=MAX_NUM_LISTED)] | None = None
    stop: Stop | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_NUM_LISTED, fail_fast=True)] | None = None
    min_tokens: Int64 | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: Int64 | None = None
    truncate_prompt_tokens: Int64 | None = None
    """Keep only this many of the prompt's last tokens; -1: as many as the context holds."""
    return_token_ids: bool | None = None
    priority: Int64 | None = None
    """Lower goes first."""
    request_id: Annotated[str, Field(pattern=r"^[\x21-\x7e]{1,128}$")] | None = None
    user: str | None = None


class CompletionBody(GenerationBody):
    """POST /v1/completions"""

    prompt: Prompt
    max_tokens: Int64 | None = None
    logprobs: Int64 | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None
    best_of: Int64 | None = None


class Message(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


Messages = Annotated[list[Message], Field(min_length=1, fail_fast=True)]


class ConversationBody(Body):
    """What chat completions and /tokenize share: how a conversation becomes a prompt."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None


class ChatBody(GenerationBody, ConversationBody):
    """POST /v1/chat/completions"""

    messages: Messages
    max_completion_tokens: Int64 | None = None
    max_tokens: Int64 | None = None
    logprobs: bool | None = None
    top_logprobs: Int64 | None = None


class TokenizeBody(ConversationBody):
    """POST /tokenize: either a prompt or a conversation."""

    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    """POST /detokenize"""

    tokens: TokenIds
