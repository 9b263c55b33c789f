"""Values that clients give for fields of a request: as Python's own types, or an error that names the field."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from loongjax.errors import RequestError


def as_integer(name: str, value: Any) -> int:
    """An integer of any kind, NumPy's too. Raises RequestError."""
    if not is_integer(value):
        raise wrong_type(name, "an integer", value)
    return int(value)


def as_number(name: str, value: Any) -> float:
    """A real number of any kind; one beyond all floats becomes infinite. Raises RequestError."""
    if not _is_number(value):
        raise wrong_type(name, "a number", value)
    return _to_float(value)


def as_flag(name: str, value: Any) -> bool:
    """True or False. Raises RequestError."""
    if not isinstance(value, bool):
        raise wrong_type(name, "True or False", value)
    return value


def as_integers(name: str, value: Any) -> tuple[int, ...]:
    """Integers, in any iterable or array. Raises RequestError."""
    expected = "a list of integers"
    items = as_items(name, value, expected)
    # By types, of which there are few, for a prompt has up to a million items.
    bad_types = {kind for kind in set(map(type, items)) if not _is_integer_type(kind)}
    if bad_types:
        bad = next(item for item in items if type(item) in bad_types)
        raise wrong_type(name, expected, bad, among="one that holds ")
    return tuple(map(int, items))


def as_strings(name: str, value: Any) -> tuple[str, ...]:
    """One string, or strings in any iterable. Raises RequestError."""
    if isinstance(value, str):
        return (value,)
    expected = "a string or a list of strings"
    items = as_items(name, value, expected)
    if bad := [item for item in items if not isinstance(item, str)]:
        raise wrong_type(name, expected, bad[0], among="one that holds ")
    return items


def as_biases(name: str, value: Any) -> dict[int, float]:
    """A mapping from integers to numbers. Raises RequestError."""
    expected = "a mapping from token ids to numbers"
    if not isinstance(value, Mapping):
        raise wrong_type(name, expected, value)
    if bad := [item for item in value.items() if not is_integer(item[0]) or not _is_number(item[1])]:
        raise wrong_type(name, expected, dict(bad[:1]))
    return {int(key): _to_float(bias) for key, bias in value.items()}


def as_items(name: str, value: Any, expected: str) -> tuple[Any, ...]:
    """What an iterable or an array holds, of arrays Python's numbers. Raises RequestError, for texts and mappings."""
    if hasattr(value, "__array__"):
        value = np.asarray(value).tolist()
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise wrong_type(name, expected, value)
    return tuple(value)


def wrong_type(name: str, expected: str, got: Any, *, among: str = "") -> RequestError:
    """The error for a value of another type, at a field of this name."""
    shown = repr(got)
    shown = shown if len(shown) <= 100 else f"{shown[:100]}..."
    return RequestError(f"{name} must be {expected}, got {among}{shown} ({type(got).__name__})", name)


def is_integer(value: Any) -> bool:
    """Whether it is an integer of any kind, and no bool."""
    return _is_integer_type(type(value))


def _is_integer_type(kind: type) -> bool:
    return issubclass(kind, numbers.Integral) and kind is not bool


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _to_float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
