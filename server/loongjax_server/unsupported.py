"""Fields that would change the output in ways this server cannot: refused, never ignored without a word."""

from __future__ import annotations

import logging
from typing import Any

from loongjax.errors import RequestError
from loongjax_server.schemas import Body, CompletionBody, ConversationBody

logger = logging.getLogger(__name__)

REFUSED = {
    "suffix": "inserting text before a suffix is not supported",
    "structured_outputs": "constrained decoding is not supported",
    "guided_json": "constrained decoding is not supported",
    "guided_regex": "constrained decoding is not supported",
    "guided_choice": "constrained decoding is not supported",
    "guided_grammar": "constrained decoding is not supported",
    "json_schema": "constrained decoding is not supported",
    "regex": "constrained decoding is not supported",
    "ebnf": "constrained decoding is not supported",
    "logits_processors": "custom logits processors are not supported",
    "logit_processors": "custom logits processors are not supported",
    "allowed_token_ids": "allowed_token_ids is not supported; logit_bias can favour tokens",
    "bad_words": "bad_words is not supported; logit_bias can ban tokens",
    "use_beam_search": "beam search is not supported",
    "prompt_embeds": "prompts must be text or token ids; embeddings are not supported",
    "functions": "functions is deprecated and not supported; use tools",
    "function_call": "function_call is deprecated and not supported; use tools",
    "add_special_tokens": "a chat template writes the special tokens itself",
    "audio": "audio is not supported",
    "chat_template": "a request may not bring its own chat template; the server's operator sets it",
    "documents": "documents is not supported; put their text in the messages",
    "web_search_options": "web search is not supported",
}
"""Field to reason. Null, false and empty values pass."""

HARMLESS = frozenset(
    {
        "cache_salt",
        "metadata",
        "parallel_tool_calls",
        "prediction",
        "safety_identifier",
        "service_tier",
        "spaces_between_special_tokens",
        "store",
        "verbosity",
    }
)
"""Known fields that clients send and that change nothing here: ignored without a word."""

_MAX_NUM_WARNINGS = 1000


class UnsupportedFields:
    """Refuses what cannot be honoured, and warns once of each field that is not known."""

    def __init__(self, *, takes_tools: bool) -> None:
        """`takes_tools`: whether the chat template has a place for tools."""
        self._takes_tools = takes_tools
        self._warned: set[str] = set()

    def check(self, body: Body) -> None:
        """Raises RequestError for a field whose meaning would be lost."""
        extra = body.model_extra or {}
        for name, value in extra.items():
            if name in REFUSED and value:
                raise RequestError(REFUSED[name], name)
        _check_response_format(extra.get("response_format"))
        if extra.get("modalities") not in (None, [], ["text"]):
            raise RequestError("only the text modality is supported", "modalities")
        if extra.get("echo"):
            raise RequestError("echo is only supported by /v1/completions", "echo")
        if isinstance(body, CompletionBody) and body.best_of is not None and body.best_of != (body.n or 1):
            raise RequestError("best_of is not supported; leave it out, or make it equal to n", "best_of")
        self._warn(extra)
        if isinstance(body, ConversationBody) and body.tools and body.tool_choice != "none" and not self._takes_tools:
            self._warn_of_lost_tools()

    def _warn(self, extra: dict[str, Any]) -> None:
        unknown = extra.keys() - HARMLESS - REFUSED.keys() - {"response_format", "modalities", "echo"} - self._warned
        for name in sorted(unknown):
            if len(self._warned) < _MAX_NUM_WARNINGS:
                self._warned.add(name)
                logger.warning("ignoring unknown field %.100r; said once", name)

    def _warn_of_lost_tools(self) -> None:
        if "tools" not in self._warned:
            self._warned.add("tools")
            logger.warning(
                "the chat template has no place for tools: the model does not see them (give --chat-template one that "
                "does; said once)"
            )


def _check_response_format(response_format: Any) -> None:
    if response_format is None:
        return
    kind = response_format.get("type") if isinstance(response_format, dict) else response_format
    if kind != "text":
        raise RequestError(
            'response_format must be {"type": "text"}; constrained decoding is not supported', "response_format"
        )
