"""From what a request calls its prompt to token ids. Everything here runs off the event loop."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import jinja2

from loongjax.engine.client import ModelInfo
from loongjax.errors import RequestError
from loongjax_server.schemas import ChatBody, CompletionBody, ConversationBody, Message
from loongjax_server.tokenizer import TextTokenizer

ROLES = ("system", "developer", "user", "assistant", "tool")
RESERVED_TEMPLATE_KWARGS = frozenset(
    {
        "messages",
        "conversation",
        "chat_template",
        "tools",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "return_dict",
        "return_tensors",
        "return_assistant_tokens_mask",
        "padding",
        "truncation",
        "max_length",
        "tokenizer_kwargs",
        "documents",
    }
)
"""What `chat_template_kwargs` may not set: it has a field of its own, or belongs to the tokenizer."""

_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt, ready for the engine."""

    token_ids: Sequence[int]
    text: str = ""
    """What `echo` repeats."""


def completion_prompts(body: CompletionBody, tokenizer: TextTokenizer, info: ModelInfo) -> list[Prompt]:
    """The prompts of a completion, in order. Raises RequestError."""
    prompt = body.prompt
    items: list[Any] = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
    add_special_tokens = True if body.add_special_tokens is None else body.add_special_tokens
    skip_special_tokens = True if body.skip_special_tokens is None else body.skip_special_tokens
    prompts: list[Prompt] = []
    for item in items:
        if isinstance(item, str):
            token_ids = tokenizer.encode(item, add_special_tokens=add_special_tokens)
        else:
            token_ids = item
            check_token_ids(token_ids, info.vocab_size, "prompt")
        kept = truncate(token_ids, body.truncate_prompt_tokens, info)
        text = ""
        if body.echo:
            is_verbatim = isinstance(item, str) and len(kept) == len(token_ids)
            text = item if is_verbatim else tokenizer.decode(kept, skip_special_tokens=skip_special_tokens)
        prompts.append(Prompt(kept, text))
    return prompts


def chat_prompt(body: ChatBody, tokenizer: TextTokenizer, info: ModelInfo, chat_template: str | None) -> Prompt:
    """The prompt of a chat completion. Raises RequestError."""
    token_ids = conversation_token_ids(body.messages, body, tokenizer, chat_template)
    return Prompt(truncate(token_ids, body.truncate_prompt_tokens, info))


def conversation_token_ids(
    messages: Sequence[Message], body: ConversationBody, tokenizer: TextTokenizer, chat_template: str | None
) -> list[int]:
    """Applies the chat template, the operator's if there is one.

    `tools` reach the template unless `tool_choice` is "none"; with "auto" the model sees them and answers in text,
    which is never parsed into tool calls. Forcing a call is refused.

    Raises:
        RequestError: no template, a message it cannot take, options that contradict each other.
    """
    if chat_template is None and not tokenizer.has_chat_template:
        raise RequestError(
            "this model has no chat template: use /v1/completions, or start the server with a chat template", "messages"
        )
    if body.add_generation_prompt and body.continue_final_message:
        raise RequestError(
            "add_generation_prompt and continue_final_message exclude each other", "continue_final_message"
        )
    template_kwargs = dict(body.chat_template_kwargs or {})
    if reserved := sorted(template_kwargs.keys() & RESERVED_TEMPLATE_KWARGS):
        raise RequestError(f"chat_template_kwargs may not set {reserved[0]}", "chat_template_kwargs")
    if chat_template is not None:
        template_kwargs["chat_template"] = chat_template
    if tools := _visible_tools(body):
        template_kwargs["tools"] = tools
    continue_final_message = bool(body.continue_final_message)
    add_generation_prompt = body.add_generation_prompt
    if add_generation_prompt is None:
        add_generation_prompt = not continue_final_message
    conversation = [_plain_message(message, position) for position, message in enumerate(messages)]
    try:
        return tokenizer.apply_chat_template(
            conversation,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **template_kwargs,
        )
    except RequestError:
        raise
    except _TEMPLATE_ERRORS as error:
        raise RequestError(f"the chat template refused the conversation: {str(error)[:500]}", "messages") from error


def truncate(token_ids: Sequence[int], truncate_prompt_tokens: int | None, info: ModelInfo) -> Sequence[int]:
    """The last `truncate_prompt_tokens` of a prompt's tokens; -1: as many as the context holds."""
    if truncate_prompt_tokens is None:
        return token_ids
    if truncate_prompt_tokens != -1 and truncate_prompt_tokens < 1:
        raise RequestError(
            f"truncate_prompt_tokens must be at least 1, or -1, got {truncate_prompt_tokens}", "truncate_prompt_tokens"
        )
    limit = info.max_model_len if truncate_prompt_tokens == -1 else truncate_prompt_tokens
    return token_ids[-limit:]


def check_token_ids(token_ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Raises RequestError for an id outside the vocabulary."""
    if not token_ids:
        return
    for token_id in (min(token_ids), max(token_ids)):
        if not 0 <= token_id < vocab_size:
            raise RequestError(f"{param}: token ids are from 0 to {vocab_size - 1}, got {str(token_id)[:40]}", param)


def _visible_tools(body: ConversationBody) -> list[dict[str, Any]]:
    match body.tool_choice:
        case None | "auto":
            return body.tools or []
        case "none":
            return []
        case _:
            raise RequestError('tool_choice must be "none" or "auto": calls cannot be forced', "tool_choice")


def _plain_message(message: Message, position: int) -> dict[str, Any]:
    """A message as templates know it: text content, and "developer", which few templates have, as "system"."""
    param = f"messages.{position}"
    if message.role not in ROLES:
        raise RequestError(f"{param}: role must be one of {', '.join(ROLES)}, got {message.role[:100]!r}", "messages")
    if message.content is None and message.role != "assistant":
        raise RequestError(f"{param}: content is missing", "messages")
    plain: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": _plain_content(message.content, param),
    }
    if message.name is not None:
        plain["name"] = message.name
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        plain["tool_calls"] = [_plain_tool_call(call, param) for call in message.tool_calls]
    return plain


def _plain_content(content: str | list[dict[str, Any]] | None, param: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    texts: list[str] = []
    for part in content:
        if part.get("type") != "text":
            raise RequestError(f"{param}: only text parts are supported, got {part.get('type')!r:.100}", "messages")
        text = part.get("text")
        if not isinstance(text, str):
            raise RequestError(f"{param}: a text part needs a string in text", "messages")
        texts.append(text)
    return "\n".join(texts)


def _plain_tool_call(call: dict[str, Any], param: str) -> dict[str, Any]:
    """A call whose arguments, which clients send as JSON text, are the object that templates expect."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RequestError(f"{param}: a tool call needs a function with a name", "messages")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments else {}
        except (ValueError, RecursionError):
            raise RequestError(f"{param}: the arguments of a tool call must be JSON", "messages") from None
    return {**call, "function": {**function, "arguments": arguments}}
