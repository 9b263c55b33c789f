"""POST /v1/completions"""

from __future__ import annotations

import itertools
import time
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from loongjax.engine.client import OutputDelta
from loongjax_server.assembly import Assembly
from loongjax_server.body import read_body
from loongjax_server.context import ServerContext, get_context
from loongjax_server.disconnect import until_disconnect
from loongjax_server.generation import Generation
from loongjax_server.json_response import JsonResponse
from loongjax_server.logprobs import CompletionLogprobs, prompt_logprobs
from loongjax_server.openapi import generation_request
from loongjax_server.prompts import completion_prompts
from loongjax_server.request_id import take_body_id
from loongjax_server.sampling import completion_sampling
from loongjax_server.schemas import CompletionBody
from loongjax_server.service_level import read_service_level
from loongjax_server.sse import EventStream
from loongjax_server.token_text import TokenTexts

router = APIRouter()


@router.post("/v1/completions", openapi_extra=generation_request(CompletionBody))
async def create_completion(request: Request, context: Annotated[ServerContext, Depends(get_context)]) -> Response:
    """Continues one prompt or many."""
    arrival_s = time.perf_counter()
    body = await read_body(request, context, CompletionBody)
    request_id = take_body_id(request, body.request_id)
    slo = read_service_level(request.headers)
    sampling = completion_sampling(body, context.engine.info)
    prompts = await context.off_loop(completion_prompts, body, context.tokenizer, context.engine.info)
    generation = Generation(
        context,
        f"cmpl-{request_id}",
        prompts,
        sampling,
        arrival_s=arrival_s,
        priority=body.priority or 0,
        slo=slo,
    )
    header = {
        "id": generation.response_id,
        "object": "text_completion",
        "created": int(time.time()),
        "model": context.model_name,
    }
    writers = [
        CompletionChoice(choice_idx, body, generation, context.token_texts)
        for choice_idx in range(generation.num_choices)
    ]
    assembly = Assembly(generation, header, "text_completion", writers)
    if body.stream:
        return EventStream(assembly.chunks(body.stream_options), request_id)
    return JsonResponse(await until_disconnect(request.receive, assembly.whole()))


class CompletionChoice:
    """Writes one choice of a completion. What precedes the output goes into its first chunk."""

    def __init__(self, index: int, body: CompletionBody, generation: Generation, token_texts: TokenTexts) -> None:
        self._index = index
        self._body = body
        self._generation = generation
        self._token_texts = token_texts
        self._logprobs = CompletionLogprobs(token_texts, skip_special_tokens=generation.sampling.skip_special_tokens)
        self._is_first = True

    def whole(self, delta: OutputDelta) -> dict[str, Any]:
        choice = self.chunk(delta)
        if self._generation.sampling.prompt_logprobs is not None:
            tokens = self._generation.prompt_logprobs_of(self._index)
            choice["prompt_logprobs"] = prompt_logprobs(tokens, self._token_texts)
        return choice

    def chunk(self, delta: OutputDelta) -> dict[str, Any]:
        is_first, self._is_first = self._is_first, False
        prompt = self._generation.prompt_of(self._index)
        echoes = is_first and bool(self._body.echo)
        logprobs: dict[str, Any] | None = None
        if self._body.logprobs is not None and echoes:
            prompt_tokens = self._generation.prompt_logprobs_of(self._index)
            logprobs = self._logprobs.write(
                itertools.chain(prompt_tokens, delta.logprobs), first_token_id=prompt.token_ids[0]
            )
        elif self._body.logprobs is not None:
            logprobs = self._logprobs.write(delta.logprobs)
        choice: dict[str, Any] = {
            "index": self._index,
            "text": prompt.text + delta.text if echoes else delta.text,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if self._body.return_token_ids:
            choice["prompt_token_ids"] = list(prompt.token_ids) if is_first else None
            choice["token_ids"] = list(delta.token_ids)
        return choice
