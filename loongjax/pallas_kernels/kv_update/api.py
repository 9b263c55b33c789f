"""The public op."""

import jax
from jaxtyping import Array, Float, Int32

from loongjax.pallas_kernels.gpu_only import gpu_only
from loongjax.pallas_kernels.kv_update.reference import reference_kv_update
from loongjax.pallas_kernels.operands import check_floats, check_indices, check_one_dtype, check_shapes
from loongjax.pallas_kernels.triton_gpu import is_triton_usable, require_triton
from loongjax.pallas_kernels.variants import pick_variant


def _triton(*operands: jax.Array) -> jax.Array:
    """Imports the variant on first use: its packages come with the `gpu` extra."""
    require_triton("kv_update")
    from loongjax.pallas_kernels.kv_update.triton_variant import triton_kv_update

    return triton_kv_update(*operands)


VARIANTS = {"reference": reference_kv_update, "triton": gpu_only("kv_update", "triton", _triton)}


def kv_update(
    kv_pool: Float[Array, "L 2 P page_size K H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    layer: Int32[Array, ""],
    slots: Int32[Array, "T"],
    *,
    implementation: str | None = None,
) -> Float[Array, "L 2 P page_size K H"]:
    """The pool with the keys and values of T tokens written to one layer's slots.

    In place where the caller's jitted function donates the pool; a copy of the whole pool where it does not.

    Args:
        kv_pool: keys ([:, 0]) and values ([:, 1]) of all layers.
        k: keys, rounded to the pool's dtype.
        v: values, likewise, in the dtype of the keys.
        layer: which layer.
        slots: page * page_size + offset, no two the same; negative, or beyond the pool: the token is dropped.
        implementation: "reference" (a jax scatter), "triton" (on a GPU), or None for the best here.

    Raises:
        ValueError: shapes that are not as above, dtypes other than a floating one of the pool, one of keys and values,
            and int32 layer and slots, or an unknown implementation.
        ConfigError: "triton" without the packages that it needs.
        NotImplementedError: an implementation that is not built, or "triton" in a program for no GPU.
    """
    check_shapes(
        "kv_update",
        kv_pool=(kv_pool, "L 2 P page_size K H"),
        k=(k, "T K H"),
        v=(v, "T K H"),
        layer=(layer, ""),
        slots=(slots, "T"),
    )
    check_floats("kv_update", kv_pool=kv_pool)
    check_one_dtype("kv_update", k=k, v=v)
    check_indices("kv_update", layer=layer, slots=slots)
    default = "triton" if is_triton_usable() else "reference"
    return pick_variant("kv_update", implementation, VARIANTS, default=default)(kv_pool, k, v, layer, slots)
