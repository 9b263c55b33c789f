"""What `LLM.generate` takes: prompts of every kind, and one value for all of them or one each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, SupportsIndex, TypeGuard

from loongjax.core.field_values import as_items, is_integer, wrong_type
from loongjax.errors import RequestError

Prompt = str | Iterable[SupportsIndex]
"""Text, or token ids: a list, a NumPy or JAX array, any iterable of integers."""

_EXPECTED_PROMPTS = "a text, a list of token ids, or a list of such prompts"


def as_prompts(prompts: Prompt | Iterable[Prompt]) -> list[Prompt]:
    """The prompts one by one, if there is only one, too. Token ids are looked at on admission.

    Raises:
        RequestError: neither texts nor lists, or token ids among them.
    """
    if isinstance(prompts, str):
        return [prompts]
    items = as_items("prompts", prompts, _EXPECTED_PROMPTS)
    num_integers = sum(map(is_integer, items))
    if num_integers and num_integers == len(items):
        return [items]
    if num_integers:
        raise RequestError("token ids stand among the prompts: put each prompt's into a list of its own", "prompts")
    if bad := [item for item in items if not isinstance(item, Iterable)]:
        raise wrong_type("prompts", _EXPECTED_PROMPTS, bad[0], among="one that holds ")
    return list(items)


def one_each[Item](given: Item | Iterable[Item], kind: type[Item], num_prompts: int, param: str) -> Sequence[Item]:
    """A value for each prompt.

    Args:
        given: one for all of them, or one for each.
        kind: what a value is.
        num_prompts: how many.
        param: what `generate` calls them.

    Raises:
        RequestError: values of other types, or not as many as prompts.
    """

    def is_one(value: Any) -> TypeGuard[Item]:
        return is_integer(value) if kind is int else isinstance(value, kind)

    if is_one(given):
        return [given] * num_prompts
    expected = f"{kind.__name__}, or a list of one for each prompt"
    items = as_items(param, given, expected)
    if bad := [item for item in items if not is_one(item)]:
        raise wrong_type(param, expected, bad[0], among="one that holds ")
    if len(items) != num_prompts:
        raise RequestError(f"there are {num_prompts} prompts but {len(items)} of {param}: give one, or one each", param)
    return items
