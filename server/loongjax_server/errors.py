"""The one table from errors to HTTP.

| error                                | status | code                    |
|--------------------------------------|--------|-------------------------|
| RequestError, malformed body         | 400    |                         |
| ContextLengthError                   | 400    | context_length_exceeded |
| AuthenticationError                  | 401    | invalid_api_key         |
| ModelNotFoundError                   | 404    | model_not_found         |
| unknown route, wrong method          | 404, 405 |                       |
| BodyTooLargeError                    | 413    | request_too_large       |
| QueueFullError                       | 429    | rate_limit_exceeded     |
| ClientDisconnectedError              | 499    | (nobody reads it)       |
| EngineError, anything unforeseen     | 500    | internal_error          |
| EngineDeadError                      | 503    | service_unavailable     |
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from loongjax.errors import (
    ContextLengthError,
    EngineDeadError,
    EngineError,
    LoongjaxError,
    QueueFullError,
    RequestError,
)
from loongjax_server.json_response import JsonResponse

logger = logging.getLogger(__name__)


class AuthenticationError(LoongjaxError):
    """No API key, or a wrong one."""


class ModelNotFoundError(RequestError):
    """A model that is not served here."""


class BodyTooLargeError(RequestError):
    """A body above `max_body_bytes`."""


class ClientDisconnectedError(LoongjaxError):
    """The client went away before its response was complete."""


@dataclasses.dataclass(frozen=True)
class HttpError:
    """An error as a client sees it."""

    status: int
    type: str
    code: str | None
    message: str
    param: str | None = None
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        """The OpenAI error object."""
        return {
            "error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code},
        }

    def response(self) -> Response:
        return JsonResponse(self.body, status_code=self.status, headers=self.headers)


def http_error(error: BaseException) -> HttpError:
    """How an error is told to a client. Messages of unforeseen errors stay in the log."""
    match error:
        case HTTPException():
            kind = "NotFoundError" if error.status_code == 404 else "invalid_request_error"
            return HttpError(error.status_code, kind, None, str(error.detail), headers=error.headers or {})
        case ContextLengthError():
            message = error.message
            if "maximum context length" not in message:
                message = f"The request exceeds the model's maximum context length: {message}"
            return HttpError(400, "invalid_request_error", "context_length_exceeded", message, error.param)
        case ModelNotFoundError():
            return HttpError(404, "NotFoundError", "model_not_found", error.message, error.param)
        case BodyTooLargeError():
            return HttpError(413, "invalid_request_error", "request_too_large", error.message)
        case RequestError():
            return HttpError(400, "invalid_request_error", None, error.message, error.param)
        case AuthenticationError():
            return HttpError(
                401, "AuthenticationError", "invalid_api_key", str(error), headers={"WWW-Authenticate": "Bearer"}
            )
        case QueueFullError():
            wait = {
                "Retry-After": str(math.ceil(error.retry_after_s)),
                "Retry-After-Ms": str(math.ceil(1000 * error.retry_after_s)),
            }
            return HttpError(429, "rate_limit_error", "rate_limit_exceeded", error.message, headers=wait)
        case ClientDisconnectedError():
            return HttpError(499, "ClientDisconnectedError", None, "the client went away")
        case EngineDeadError():
            message = str(error) or "the engine accepts no requests"
            return HttpError(
                503, "ServiceUnavailableError", "service_unavailable", message, headers={"Retry-After": "1"}
            )
        case EngineError():
            return HttpError(500, "InternalServerError", "internal_error", str(error) or "the engine failed")
        case _:
            return HttpError(500, "InternalServerError", "internal_error", "internal server error")


def log_error(error: BaseException, request_id: str) -> None:
    """Logs what an operator should know: server errors in full, a client's mistakes at DEBUG."""
    status = http_error(error).status
    if status == 500:
        logger.error("request %s failed", request_id, exc_info=error)
    elif status == 499:
        logger.info("request %s: 499, the client went away", request_id)
    elif status == 503:
        logger.warning("request %s: 503, %s", request_id, error)
    else:
        logger.debug("request %s: %d, %s", request_id, status, error)


async def handle_error(request: Request, error: Exception) -> Response:
    """The application's handler of every exception."""
    log_error(error, request.scope.get("state", {}).get("request_id", "-"))
    return http_error(error).response()
