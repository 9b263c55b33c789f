"""JSON as the server writes it: compact, UTF-8, and never with NaN or Infinity."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import Response


def dump_json(value: Any) -> bytes:
    """Compact UTF-8 JSON. Raises ValueError for NaN and infinities, which JSON does not have."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", errors="replace")


class JsonResponse(Response):
    """A response of one JSON value."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return dump_json(content)
