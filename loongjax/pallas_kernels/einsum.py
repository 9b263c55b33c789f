"""Matrix products as the attention ops take them: operands in their own dtype, sums in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32


def einsum_to_float32(subscripts: str, a: Float[Array, "..."], b: Float[Array, "..."]) -> Float32[Array, "..."]:
    """`jnp.einsum` of two operands of one dtype that accumulates in float32; float32 operands are not rounded."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jnp.einsum(subscripts, a, b, precision=precision, preferred_element_type=jnp.float32)
