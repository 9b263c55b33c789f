"""GET /v1/models"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends
from starlette.responses import Response

from loongjax_server.context import ServerContext, get_context
from loongjax_server.errors import ModelNotFoundError
from loongjax_server.json_response import JsonResponse

router = APIRouter()


@router.get("/v1/models")
async def list_models(context: Annotated[ServerContext, Depends(get_context)]) -> Response:
    """The one model that is served."""
    return JsonResponse({"object": "list", "data": [_card(context)]})


@router.get("/v1/models/{model:path}")
async def get_model(model: str, context: Annotated[ServerContext, Depends(get_context)]) -> Response:
    """The model of this name."""
    if model != context.model_name:
        raise ModelNotFoundError(f"The model {model[:200]!r} does not exist", "model")
    return JsonResponse(_card(context))


def _card(context: ServerContext) -> dict[str, Any]:
    info = context.engine.info
    return {
        "id": context.model_name,
        "object": "model",
        "created": context.created_s,
        "owned_by": "loongjax",
        "root": info.checkpoint,
        "parent": None,
        "max_model_len": info.max_model_len,
        "permission": [],
    }
