"""How soon a client wants its tokens, from the headers of its request."""

from __future__ import annotations

import re
from typing import Any

from starlette.datastructures import Headers

from loongjax.core.request import LEAST_WISH_S, ServiceLevel
from loongjax.errors import RequestError

TTFT_HEADER = "x-slo-ttft-ms"
TPOT_HEADER = "x-slo-tpot-ms"

_NUMBER = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")


def read_service_level(headers: Headers) -> ServiceLevel:
    """The wishes of a request: milliseconds to its first token, and between those after it. Raises RequestError."""
    return ServiceLevel(ttft_s=_read_seconds(headers, TTFT_HEADER), tpot_s=_read_seconds(headers, TPOT_HEADER))


def describe_headers() -> list[dict[str, Any]]:
    """These headers as parameters of the OpenAPI document."""
    descriptions = {
        TTFT_HEADER: "Wished for: milliseconds to the first token.",
        TPOT_HEADER: "Wished for: milliseconds between later tokens, on average.",
    }
    schema = {"type": "string", "pattern": f"^{_NUMBER.pattern}$"}
    return [
        {"name": name, "in": "header", "required": False, "description": description, "schema": schema}
        for name, description in descriptions.items()
    ]


def _read_seconds(headers: Headers, name: str) -> float | None:
    values = headers.getlist(name)
    if not values:
        return None
    milliseconds = float(values[0]) if len(values) == 1 and _NUMBER.fullmatch(values[0]) else 0.0
    if milliseconds / 1000.0 < LEAST_WISH_S:
        shown = ", ".join(values)[:100]
        raise RequestError(
            f"{name} must be a number of milliseconds, at least {1000.0 * LEAST_WISH_S:g}, such as 200 or 12.5, "
            f"got {shown!r}",
            name,
        )
    return milliseconds / 1000.0
