"""POST /v1/chat/completions"""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from loongjax.engine.client import OutputDelta
from loongjax_server.assembly import Assembly, WholeOutput
from loongjax_server.body import read_body
from loongjax_server.context import ServerContext, get_context
from loongjax_server.disconnect import until_disconnect
from loongjax_server.generation import Generation
from loongjax_server.json_pieces import JsonArray, PiecewiseJsonResponse
from loongjax_server.logprobs import chat_logprobs, prompt_logprobs
from loongjax_server.openapi import generation_request
from loongjax_server.prompts import chat_prompt
from loongjax_server.request_id import take_body_id
from loongjax_server.sampling import chat_sampling
from loongjax_server.schemas import ChatBody
from loongjax_server.service_level import read_service_level
from loongjax_server.sse import EventStream
from loongjax_server.token_text import TokenTexts

router = APIRouter()


@router.post("/v1/chat/completions", openapi_extra=generation_request(ChatBody))
async def create_chat_completion(request: Request, context: Annotated[ServerContext, Depends(get_context)]) -> Response:
    """Answers a conversation. See `conversation_token_ids` for what becomes of tools."""
    arrival_s = time.perf_counter()
    body = await read_body(request, context, ChatBody)
    request_id = take_body_id(request, body.request_id)
    slo = read_service_level(request.headers)
    sampling = chat_sampling(body, context.engine.info)
    prompt = await context.off_loop(chat_prompt, body, context.tokenizer, context.engine.info, context.chat_template)
    generation = Generation(
        context,
        f"chatcmpl-{request_id}",
        [prompt],
        sampling,
        arrival_s=arrival_s,
        priority=body.priority or 0,
        slo=slo,
    )
    header = {
        "id": generation.response_id,
        "object": "chat.completion",
        "created": int(time.time()),
        "model": context.model_name,
    }
    writers = [
        ChatChoice(choice_idx, body, generation, context.token_texts) for choice_idx in range(generation.num_choices)
    ]
    assembly = Assembly(generation, header, "chat.completion.chunk", writers)
    if body.stream:
        return EventStream(assembly.chunks(body.stream_options), request_id)
    response = await until_disconnect(request.receive, assembly.whole())
    if sampling.prompt_logprobs is not None:
        response["prompt_logprobs"] = await generation.write(
            lambda: JsonArray(prompt_logprobs(generation.prompt_logprobs_of(0), context.token_texts))
        )
    if body.return_token_ids:
        response["prompt_token_ids"] = list(prompt.token_ids)
    return PiecewiseJsonResponse(response)


class ChatChoice:
    """Writes one choice of a chat completion. The role comes with the first token, never before it."""

    def __init__(self, index: int, body: ChatBody, generation: Generation, token_texts: TokenTexts) -> None:
        self._index = index
        self._body = body
        self._generation = generation
        self._token_texts = token_texts
        self._gathered = JsonArray()
        self._is_first = True

    def gather(self, delta: OutputDelta) -> None:
        if self._body.logprobs:
            self._gathered.extend(chat_logprobs(delta.logprobs, self._token_texts)["content"])

    def whole(self, output: WholeOutput) -> dict[str, Any]:
        message = {"role": "assistant", "content": output.text, "refusal": None}
        logprobs = {"content": self._gathered, "refusal": None} if self._body.logprobs else None
        choice = self._choice("message", message, logprobs, output)
        if self._body.return_token_ids:
            choice["token_ids"] = output.token_ids
        return choice

    def chunk(self, delta: OutputDelta) -> dict[str, Any]:
        is_first, self._is_first = self._is_first, False
        content: dict[str, Any] = {"content": delta.text}
        if is_first:
            content = {"role": "assistant", **content}
        logprobs = chat_logprobs(delta.logprobs, self._token_texts) if self._body.logprobs else None
        choice = self._choice("delta", content, logprobs, delta)
        if self._body.return_token_ids:
            choice["token_ids"] = list(delta.token_ids)
            if is_first:
                choice["prompt_token_ids"] = list(self._generation.prompt_of(self._index).token_ids)
        return choice

    def _choice(
        self,
        name: str,
        content: dict[str, Any],
        logprobs: dict[str, Any] | None,
        output: OutputDelta | WholeOutput,
    ) -> dict[str, Any]:
        return {
            "index": self._index,
            name: content,
            "logprobs": logprobs,
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        }
