"""Manual-axis types: inside a `shard_map` that checks them, what a loop or a branch starts with must vary over the same
mesh axes as what comes out of it.
"""

from __future__ import annotations

import jax


def vary_as[Tree](tree: Tree, *references: object) -> Tree:
    """The same values, typed as varying over every mesh axis that a leaf of `references` varies over.

    It moves no data, and does nothing outside `shard_map` and where `check_vma=False`. Its transpose is a psum, so a
    gradient with respect to a replicated operand comes out replicated, as it should.
    """
    axes = frozenset().union(*(_varying_axes(leaf) for leaf in jax.tree.leaves(references)))

    def cast(leaf: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - _varying_axes(leaf), key=str))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, tree)


def vary_together[*Arrays](*arrays: *Arrays) -> tuple[*Arrays]:
    """All arrays, typed as varying over every mesh axis that any of them varies over."""
    return vary_as(arrays, arrays)


def _varying_axes(array: jax.Array) -> frozenset:
    return jax.typeof(array).manual_axis_type.varying
