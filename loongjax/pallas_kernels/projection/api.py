"""The public ops."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from loongjax.pallas_kernels.gpu_only import gpu_only
from loongjax.pallas_kernels.projection.reference import reference_project, reference_project_gated
from loongjax.pallas_kernels.triton_gpu import is_triton_usable, require_triton
from loongjax.pallas_kernels.variants import pick_variant


def _triton_project(*operands: Any, **settings: Any) -> tuple[jax.Array, ...]:
    """Imports the variant on first use: its packages come with the `gpu` extra."""
    require_triton("project")
    from loongjax.pallas_kernels.projection.triton_variant import triton_project

    return triton_project(*operands, **settings)


def _triton_project_gated(*operands: jax.Array) -> jax.Array:
    require_triton("project_gated")
    from loongjax.pallas_kernels.projection.triton_variant import triton_project_gated

    return triton_project_gated(*operands)


PROJECT_VARIANTS = {"reference": reference_project, "triton": gpu_only("project", "triton", _triton_project)}
PROJECT_GATED_VARIANTS = {
    "reference": reference_project_gated,
    "triton": gpu_only("project_gated", "triton", _triton_project_gated),
}


def project(
    x: Float[Array, "T I"],
    weights: tuple[Float[Array, "_ I"], ...],
    *,
    out_dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "T _"], ...]:
    """x @ w.T for every matrix w, accumulated in float32 and rounded once.

    Args:
        x: T rows.
        weights: matrices [O, I] as in Hugging Face checkpoints, each with an O of its own, in the dtype of x.
        out_dtype: dtype of the results; that of x if None.
        implementation: "reference" (jax; float32 at the highest precision), "triton" (on a GPU, one launch for up to 3
            matrices, 1 to 32 rows of bfloat16 or float16, I a multiple of 8; the same bits on every run; forward only),
            or None for the best here.

    Raises:
        ValueError: shapes or dtypes that do not fit, or an unknown implementation.
        ConfigError: "triton" without the packages that it needs.
        NotImplementedError: an implementation that is not built, or "triton" in a program for no GPU.
    """
    default = _default_variant(x, tuple(weights), is_gated=False)
    variant = pick_variant("project", implementation, PROJECT_VARIANTS, default=default)
    _check("project", x, weights)
    return variant(x, tuple(weights), out_dtype=jnp.dtype(x.dtype if out_dtype is None else out_dtype))


def project_gated(
    x: Float[Array, "T I"],
    gate: Float[Array, "F I"],
    up: Float[Array, "F I"],
    *,
    implementation: str | None = None,
) -> Float[Array, "T F"]:
    """silu(x @ gate.T) * (x @ up.T): the first half of SwiGLU (Shazeer 2020), both products rounded to the dtype of x.

    Args:
        x: T rows.
        gate: [F, I], in the dtype of x.
        up: [F, I], likewise.
        implementation: as in `project`; for more than 8 rows, "triton" takes up to 144 KiB of shared memory.

    Raises:
        ValueError: shapes or dtypes that do not fit, or an unknown implementation.
        ConfigError: "triton" without the packages that it needs.
        NotImplementedError: an implementation that is not built, or "triton" in a program for no GPU.
    """
    default = _default_variant(x, (gate, up), is_gated=True)
    variant = pick_variant("project_gated", implementation, PROJECT_GATED_VARIANTS, default=default)
    _check("project_gated", x, (gate, up))
    if gate.shape != up.shape:
        raise ValueError(f"project_gated: both matrices must have one shape, got {gate.shape} and {up.shape}")
    return variant(x, gate, up)


def _default_variant(x: jax.Array, weights: tuple[jax.Array, ...], *, is_gated: bool) -> str:
    """The fastest variant on the devices of this process."""
    if not is_triton_usable():
        return "reference"
    from loongjax.pallas_kernels.projection.triton_variant import is_fastest, is_supported

    num_tokens, in_dim = x.shape
    num_rows = sum(weight.shape[0] for weight in weights)
    is_taken = is_supported(x.dtype.name, num_tokens, in_dim, len(weights))
    return "triton" if is_taken and is_fastest(num_tokens, num_rows, is_gated=is_gated) else "reference"


def _check(op: str, x: jax.Array, weights: tuple[jax.Array, ...]) -> None:
    for weight in weights:
        if weight.dtype != x.dtype or weight.ndim != 2 or weight.shape[1] != x.shape[1]:
            raise ValueError(
                f"{op}: matrices must be {x.dtype.name}[out, {x.shape[1]}] as x is, "
                f"got {weight.dtype.name}{list(weight.shape)}"
            )
