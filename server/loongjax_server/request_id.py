"""One id for a request: the client's if it sent a usable one, else a new one. Responses carry it in X-Request-Id."""

from __future__ import annotations

import re
import uuid

from starlette.requests import Request
from starlette.types import Scope

HEADER = b"x-request-id"
_USABLE = re.compile(rb"[\x21-\x7e]{1,128}")


def take_header_id(scope: Scope) -> str:
    """The id of the X-Request-Id header, or a new one, noted in the scope."""
    request_id = uuid.uuid4().hex
    for name, value in scope["headers"]:
        if name == HEADER and _USABLE.fullmatch(value):
            request_id = value.decode("ascii")
    scope.setdefault("state", {})["request_id"] = request_id
    return request_id


def take_body_id(request: Request, body_id: str | None) -> str:
    """The body's `request_id`, which has precedence, or the one noted before."""
    if body_id is not None:
        request.state.request_id = body_id
    return request.state.request_id
