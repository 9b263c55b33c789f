"""The definition: y_w[t, o] = sum over i of x[t, i] w[o, i], in float32, rounded once; silu(a) = a / (1 + exp(-a))."""

import jax
import numpy as np
from jaxtyping import Array, Float

from loongjax.pallas_kernels.einsum import einsum_to_float32


def reference_project(
    x: Float[Array, "T I"], weights: tuple[Float[Array, "_ I"], ...], *, out_dtype: np.dtype
) -> tuple[Float[Array, "T _"], ...]:
    """See `project`."""
    return tuple(einsum_to_float32("TI,OI->TO", x, weight).astype(out_dtype) for weight in weights)


def reference_project_gated(
    x: Float[Array, "T I"], gate: Float[Array, "F I"], up: Float[Array, "F I"]
) -> Float[Array, "T F"]:
    """See `project_gated`."""
    gate_TF, up_TF = reference_project(x, (gate, up), out_dtype=x.dtype)
    return jax.nn.silu(gate_TF) * up_TF
