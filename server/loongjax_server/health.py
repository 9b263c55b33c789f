"""GET /health, /ping, /version and /metrics"""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
from typing import Annotated

from fastapi import APIRouter, Depends
from starlette.responses import Response

from loongjax.engine.client import EngineStats
from loongjax.errors import EngineDeadError
from loongjax_server.context import ServerContext, get_context
from loongjax_server.json_response import JsonResponse
from loongjax_server.metrics import CONTENT_TYPE

logger = logging.getLogger(__name__)

router = APIRouter()


@router.get("/health", response_class=Response)
@router.head("/health", response_class=Response, include_in_schema=False)
async def health(context: Annotated[ServerContext, Depends(get_context)]) -> Response:
    """200 if the engine works and the server takes requests, 503 with the reason otherwise.

    503 means: the step loop is dead or does not answer; or devices have not answered for longer than
    `--iteration-timeout-s`, which may pass; or the server is shutting down. Take the server out of rotation at the
    first, and start it anew if it goes on: the default timeout is far above what a sound device needs.
    """
    if context.is_draining:
        raise EngineDeadError("the server is shutting down")
    await _ask_engine(context)
    return Response(status_code=200)


@router.get("/ping", response_class=Response)
@router.head("/ping", response_class=Response, include_in_schema=False)
@router.post("/ping", response_class=Response, include_in_schema=False)
async def ping(context: Annotated[ServerContext, Depends(get_context)]) -> Response:
    """The same under another name, which some hosts ask for."""
    return await health(context)


@router.get("/version")
async def version() -> Response:
    """The version of loongjax."""
    return JsonResponse({"version": importlib.metadata.version("loongjax")})


@router.get("/metrics", response_class=Response)
async def metrics(context: Annotated[ServerContext, Depends(get_context)]) -> Response:
    """Metrics in Prometheus's text format."""
    stats = await _ask_stats(context)
    is_healthy = stats is not None and await _is_healthy(context)
    page = context.metrics.render(stats, is_healthy=is_healthy)
    return Response(page, headers={"Content-Type": CONTENT_TYPE})


async def _ask_stats(context: ServerContext) -> EngineStats | None:
    """None, with a warning, from an engine that is dead or does not answer in time."""
    timeout_s = context.config.metrics_timeout_s
    try:
        async with asyncio.timeout(timeout_s):
            return await context.engine.stats()
    except TimeoutError:
        logger.warning("the engine gave no statistics: no answer within %g s", timeout_s)
    except EngineDeadError as error:
        logger.warning("the engine gave no statistics: %s", error)
    return None


async def _is_healthy(context: ServerContext) -> bool:
    timeout_s = context.config.metrics_timeout_s
    try:
        async with asyncio.timeout(timeout_s):
            await context.engine.check_health(timeout_s)
    except (TimeoutError, EngineDeadError):
        return False
    return True


async def _ask_engine(context: ServerContext) -> None:
    """Raises EngineDeadError if the engine is dead, does not answer in time, or says that its devices do not."""
    timeout_s = context.config.health_timeout_s
    try:
        # The engine keeps its own time; this is for one that does not even do that.
        async with asyncio.timeout(timeout_s + 1.0):
            await context.engine.check_health(timeout_s)
    except TimeoutError:
        raise EngineDeadError(f"the engine did not answer within {timeout_s} s") from None
