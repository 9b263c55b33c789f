"""JSON files that every reader of JSON takes: numbers that are not finite are null."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any


def write_json(value: object, path: pathlib.Path) -> None:
    """Writes one value; what JSON does not know is written as its text."""
    text = json.dumps(_finite(value), indent=2, default=str, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value
