"""POST /tokenize and /detokenize, GET /tokenizer_info"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from loongjax.errors import RequestError
from loongjax_server.body import read_body
from loongjax_server.context import ServerContext, get_context
from loongjax_server.json_pieces import JsonArray, PiecewiseJsonResponse
from loongjax_server.json_response import JsonResponse
from loongjax_server.openapi import json_body
from loongjax_server.prompts import check_token_ids, conversation_token_ids
from loongjax_server.schemas import DetokenizeBody, TokenizeBody

router = APIRouter()


@router.post("/tokenize", openapi_extra=json_body(TokenizeBody))
async def tokenize(request: Request, context: Annotated[ServerContext, Depends(get_context)]) -> Response:
    """Token ids of a prompt or of a conversation."""
    body = await read_body(request, context, TokenizeBody)
    return PiecewiseJsonResponse(await context.off_loop(_tokenize, body, context))


@router.post("/detokenize", openapi_extra=json_body(DetokenizeBody))
async def detokenize(request: Request, context: Annotated[ServerContext, Depends(get_context)]) -> Response:
    """Text of token ids, special tokens included."""
    body = await read_body(request, context, DetokenizeBody)
    check_token_ids(body.tokens, context.engine.info.vocab_size, "tokens")
    text = await context.off_loop(context.tokenizer.decode, body.tokens, skip_special_tokens=False)
    return JsonResponse({"prompt": text})


@router.get("/tokenizer_info")
async def tokenizer_info(context: Annotated[ServerContext, Depends(get_context)]) -> Response:
    """What is known of the tokenizer."""
    info = context.engine.info
    eos_tokens = context.tokenizer.convert_ids_to_tokens(info.eos_token_ids)
    return JsonResponse(
        {
            "tokenizer_class": type(context.tokenizer).__name__,
            "vocab_size": context.tokenizer.vocab_size,
            "model_max_length": info.max_model_len,
            "eos_token": eos_tokens[0] if eos_tokens else None,
            "eos_token_ids": list(info.eos_token_ids),
            "has_chat_template": context.chat_template is not None or context.tokenizer.has_chat_template,
        }
    )


def _tokenize(body: TokenizeBody, context: ServerContext) -> dict[str, object]:
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("exactly one of prompt and messages is needed", "prompt")
    if body.prompt is not None:
        add_special_tokens = True if body.add_special_tokens is None else body.add_special_tokens
        token_ids = context.tokenizer.encode(body.prompt, add_special_tokens=add_special_tokens)
    else:
        assert body.messages is not None
        token_ids = conversation_token_ids(body.messages, body, context.tokenizer, context.chat_template)
    answer: dict[str, object] = {
        "count": len(token_ids),
        "max_model_len": context.engine.info.max_model_len,
        "tokens": JsonArray(token_ids),
    }
    if body.return_token_strs:
        answer["token_strs"] = JsonArray(context.tokenizer.convert_ids_to_tokens(token_ids))
    return answer
