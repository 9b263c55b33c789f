"""POST /v1/completions"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from loongjax.core.request import TokenLogprobs
from loongjax.engine.client import OutputDelta
from loongjax_server.assembly import Assembly, WholeOutput
from loongjax_server.body import read_body
from loongjax_server.context import ServerContext, get_context
from loongjax_server.disconnect import until_disconnect
from loongjax_server.generation import Generation
from loongjax_server.json_pieces import JsonArray, PiecewiseJsonResponse
from loongjax_server.logprobs import CompletionLogprobs, prompt_logprobs
from loongjax_server.openapi import generation_request
from loongjax_server.prompts import Prompt, completion_prompts
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
    return PiecewiseJsonResponse(await until_disconnect(request.receive, assembly.whole()))


class CompletionChoice:
    """Writes one choice of a completion. What precedes the output goes into its first chunk."""

    def __init__(self, index: int, body: CompletionBody, generation: Generation, token_texts: TokenTexts) -> None:
        self._index = index
        self._body = body
        self._generation = generation
        self._token_texts = token_texts
        self._logprobs = CompletionLogprobs(token_texts, skip_special_tokens=generation.sampling.skip_special_tokens)
        self._gathered = self._logprobs.empty_arrays()
        self._is_first = True

    def gather(self, delta: OutputDelta) -> None:
        if self._body.logprobs is not None:
            self._logprobs.write_arrays(self._gathered, *self._logprobs_of(delta, echoes=self._echoes_now()))

    def whole(self, output: WholeOutput) -> dict[str, Any]:
        choice = self._choice(
            output,
            output.text,
            logprobs=self._gathered if self._body.logprobs is not None else None,
            echoes=bool(self._body.echo),
        )
        if self._body.return_token_ids:
            choice["prompt_token_ids"] = list(self._prompt.token_ids)
            choice["token_ids"] = output.token_ids
        if self._generation.sampling.prompt_logprobs is not None:
            tokens = self._generation.prompt_logprobs_of(self._index)
            choice["prompt_logprobs"] = JsonArray(prompt_logprobs(tokens, self._token_texts))
        return choice

    def chunk(self, delta: OutputDelta) -> dict[str, Any]:
        is_first, echoes = self._is_first, self._echoes_now()
        logprobs: dict[str, Any] | None = None
        if self._body.logprobs is not None and echoes:
            logprobs = self._logprobs.empty_arrays()
            self._logprobs.write_arrays(logprobs, *self._logprobs_of(delta, echoes=True))
        elif self._body.logprobs is not None:
            logprobs = self._logprobs.write(delta.logprobs)
        choice = self._choice(delta, delta.text, logprobs=logprobs, echoes=echoes)
        if self._body.return_token_ids:
            choice["prompt_token_ids"] = list(self._prompt.token_ids) if is_first else None
            choice["token_ids"] = list(delta.token_ids)
        return choice

    @property
    def _prompt(self) -> Prompt:
        return self._generation.prompt_of(self._index)

    def _echoes_now(self) -> bool:
        """Whether this delta is the choice's first, and the prompt goes before it."""
        is_first, self._is_first = self._is_first, False
        return is_first and bool(self._body.echo)

    def _logprobs_of(self, delta: OutputDelta, *, echoes: bool) -> tuple[Iterable[TokenLogprobs], int | None]:
        """A delta's tokens, with those of the prompt before them if it echoes, and then the prompt's first."""
        if not echoes:
            return delta.logprobs, None
        prompt_tokens = self._generation.prompt_logprobs_of(self._index)
        return itertools.chain(prompt_tokens, delta.logprobs), self._prompt.token_ids[0]

    def _choice(
        self, output: OutputDelta | WholeOutput, text: str, *, logprobs: Mapping[str, Any] | None, echoes: bool
    ) -> dict[str, Any]:
        return {
            "index": self._index,
            "text": self._prompt.text + text if echoes else text,
            "logprobs": logprobs,
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        }
