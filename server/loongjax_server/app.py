"""The application."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import AsyncGenerator

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from loongjax.engine.client import EngineClient
from loongjax.errors import LoongjaxError, RequestError
from loongjax_server import chat, completions, health, models, tokenization
from loongjax_server.activity_log import logged_activity
from loongjax_server.config import ServerConfig
from loongjax_server.context import ServerContext
from loongjax_server.errors import handle_error
from loongjax_server.middleware import AdmissionMiddleware, RequestMiddleware
from loongjax_server.openapi import describe_bodies
from loongjax_server.schemas import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from loongjax_server.tokenizer import TextTokenizer


def create_app(engine: EngineClient, tokenizer: TextTokenizer, config: ServerConfig) -> FastAPI:
    """An application around an engine that runs already and that it does not close.

    Raises:
        ConfigError: a chat template that cannot be read or compiled.
    """
    context = ServerContext(engine, tokenizer, config)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
        with context.threads():
            async with logged_activity(engine):
                yield

    app = FastAPI(
        title="loongjax",
        version=importlib.metadata.version("loongjax"),
        redirect_slashes=False,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.context = context
    for routes in (completions, chat, models, tokenization, health):
        app.include_router(routes.router)
    describe_bodies(app, (CompletionBody, ChatBody, TokenizeBody, DetokenizeBody))
    for kind in (LoongjaxError, HTTPException):
        app.add_exception_handler(kind, handle_error)
    app.add_exception_handler(RequestValidationError, _handle_invalid)
    app.add_middleware(AdmissionMiddleware, context=context)
    app.add_middleware(RequestMiddleware)
    return app


async def _handle_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    fault = error.errors()[0]
    path = ".".join(str(step) for step in fault["loc"])
    return await handle_error(request, RequestError(f"{path}: {fault['msg']}", str(fault["loc"][-1])))
