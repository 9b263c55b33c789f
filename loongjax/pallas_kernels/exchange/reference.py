"""The definitions, by XLA's own collectives."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Shaped

from loongjax.pallas_kernels.merge import merge_partials


def reference_all_reduce(x: Float[Array, "*shape"], axis_name: str) -> Float[Array, "*shape"]:
    """The sum over ranks in float32, rounded once."""
    return jax.lax.psum(x.astype(jnp.float32), axis_name).astype(x.dtype)


def xla_all_reduce(x: Float[Array, "*shape"], axis_name: str) -> Float[Array, "*shape"]:
    """The sum over ranks in x's own dtype, rounded as XLA pleases."""
    return jax.lax.psum(x, axis_name)


def reference_all_gather(x: Shaped[Array, "*shape"], axis_name: str) -> Shaped[Array, "n *shape"]:
    """What every rank has."""
    return jax.lax.all_gather(x, axis_name)


def reference_exchange_and_merge(
    o: Float32[Array, "n B N H"], lse: Float32[Array, "n B N"], axis_name: str, out_dtype: DTypeLike
) -> tuple[Float[Array, "B N H"], Float32[Array, "B N"]]:
    """All partial results of this rank's rows, merged."""
    # One message: the log-sum-exp travels as one more element of each head.
    sent = jnp.concatenate([o, lse[..., None]], axis=-1)
    received = jax.lax.all_to_all(sent, axis_name, split_axis=0, concat_axis=0)
    merged_o, merged_lse = merge_partials(received[..., :-1], received[..., -1])
    return merged_o.astype(out_dtype), merged_lse
