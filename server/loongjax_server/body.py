"""From the bytes of a request to its validated body."""

from __future__ import annotations

import pydantic
from starlette.requests import ClientDisconnect, Request

from loongjax.errors import RequestError
from loongjax_server.context import ServerContext
from loongjax_server.errors import BodyTooLargeError, ClientDisconnectedError, ModelNotFoundError
from loongjax_server.schemas import Body

_INLINE_BYTES = 64 * 1024
"""Bodies up to this size are parsed on the event loop: a thread would cost more than it saves."""


async def read_body[BodyType: Body](request: Request, context: ServerContext, body_type: type[BodyType]) -> BodyType:
    """Reads, parses and validates a body, and checks the model's name.

    Raises:
        RequestError: not JSON, not of this type, or with fields that cannot be honoured.
        BodyTooLargeError, ModelNotFoundError, ClientDisconnectedError: as they say.
    """
    content_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if content_type != "application/json" and not content_type.endswith("+json"):
        raise RequestError(f"Content-Type must be application/json, got {content_type[:100]!r}")
    data = await _read_bytes(request, context.config.max_body_bytes)
    if len(data) <= _INLINE_BYTES:
        body = parse_body(data, body_type)
    else:
        body = await context.off_loop(parse_body, data, body_type)
    context.unsupported_fields.check(body)
    if body.model is not None and body.model != context.model_name:
        raise ModelNotFoundError(
            f"The model {body.model[:200]!r} does not exist; this server has {context.model_name!r}", "model"
        )
    return body


def parse_body[BodyType: Body](data: bytes, body_type: type[BodyType]) -> BodyType:
    """Parses JSON into a body. Raises RequestError with the first fault and the field it is in."""
    try:
        return body_type.model_validate_json(data)
    except pydantic.ValidationError as invalid:
        fault = invalid.errors(include_url=False, include_context=False, include_input=False)[0]
        path = ".".join(str(step) for step in fault["loc"])[:200]
        message = f"{path}: {fault['msg']}" if path else fault["msg"]
        raise RequestError(message, str(fault["loc"][0])[:200] if fault["loc"] else None) from None


async def _read_bytes(request: Request, max_bytes: int) -> bytes:
    too_large = BodyTooLargeError(f"the body is larger than {max_bytes} bytes")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > max_bytes:
        raise too_large
    chunks: list[bytes] = []
    num_bytes = 0
    try:
        async for chunk in request.stream():
            num_bytes += len(chunk)
            if num_bytes > max_bytes:
                raise too_large
            chunks.append(chunk)
    except ClientDisconnect:
        raise ClientDisconnectedError from None
    return b"".join(chunks)
