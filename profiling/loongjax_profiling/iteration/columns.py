"""Values in a database's columns, which SQLite does not hold to their types: each is read with suspicion.

All of these raise ValueError, with the column's name, for what cannot be.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

from loongjax.costmodel.model_shape import ModelShape


def whole(value: object, name: str) -> int:
    """A whole number."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    return value


def seconds(value: object, name: str, *, least: float) -> float:
    """A finite time of at least so much."""
    if not isinstance(value, int | float) or not least <= value < math.inf:
        raise ValueError(f"{name} must be a finite number of seconds, at least {least:g}, got {value!r}")
    return float(value)


def text(value: object, name: str) -> str:
    """Words."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a text, got {value!r}")
    return value


def wholes(value: object, name: str) -> tuple[int, ...]:
    """A JSON list of whole numbers."""
    numbers = _json(value, name)
    if not isinstance(numbers, list):
        raise ValueError(f"{name} must be a list of whole numbers, got {value!r}")
    return tuple(whole(number, name) for number in numbers)


def model_shape(value: object, name: str) -> ModelShape:
    """A JSON object of a model's sizes. Raises ConfigError too, for sizes that no model has."""
    sizes = _json(value, name)
    names = {field.name for field in dataclasses.fields(ModelShape)}
    if not isinstance(sizes, dict) or sizes.keys() != names:
        raise ValueError(f"{name} must be an object of {', '.join(sorted(names))}, got {value!r}")
    return ModelShape(**{size: whole(number, f"{name}'s {size}") for size, number in sizes.items()})


def _json(value: object, name: str) -> Any:
    try:
        return json.loads(text(value, name))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is no JSON: {error}") from None
