"""How an op picks among its variants."""

from __future__ import annotations

from collections.abc import Mapping

PLANNED = ("mosaic_gpu", "triton")
"""Variants that some ops have, and others not, or not yet."""


def pick_variant[Variant](
    op: str, implementation: str | None, variants: Mapping[str, Variant], *, default: str
) -> Variant:
    """The variant called `implementation`, or the default one for None.

    Raises:
        NotImplementedError: a variant that this op does not have yet.
        ValueError: no variant of any op is called so.
    """
    name = default if implementation is None else implementation
    if name in variants:
        return variants[name]
    if name in PLANNED:
        raise NotImplementedError(f"{op} has no variant {name!r} yet; it has {', '.join(variants)}")
    raise ValueError(f"{op}: implementation must be None or one of {', '.join(variants)}, got {name!r}")
