"""Llama in Flax NNX, written for the inside of `shard_map`: every array is one device's shard.

Shape legend: T tokens, D model dim, N query heads, K KV heads, H head dim, F ffn, V vocabulary. Under tensor
parallelism N, K, F and V are split over `tp_axis`, D never is; a shard keeps its letters.

Modules and parameters are named, and oriented [out, in], as in Hugging Face checkpoints. What attention sees, and where
its keys live, is the caller's: `attend` is a callback, so the model knows nothing of sequence parallelism. So is
`reduce`, by which the partial sums of tensor parallelism meet.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from loongjax.models.config import ModelConfig
from loongjax.models.rope import apply_rope, rotation
from loongjax.pallas_kernels import project, project_gated

Carry = Any
"""A pytree that the attention callback threads through the layers: the KV pool, most often."""


Attend = Callable[[int, Array, Array, Array, Carry], tuple[Array, Carry]]
"""Attention of one layer: (layer, q [T, N, H], k [T, K, H], v [T, K, H], carry) -> (o [T, N, H], carry).

Queries and keys arrive rotated, in the model's dtype.
"""

Reduce = Callable[[Array], Array]
"""Partial sums [T, D] of one tensor-parallel rank -> the sum over all of them."""


class Linear(nnx.Module):
    """A matrix [out, in] and perhaps a bias [out], either of them split over tensor parallelism by its sharding."""

    def __init__(self, in_dim: int, out_dim: int, *, use_bias: bool = False, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        init = jax.nn.initializers.lecun_normal(in_axis=1, out_axis=0)
        self.weight = nnx.Param(init(rngs.params(), (out_dim, in_dim), dtype))
        self.bias = nnx.Param(jnp.zeros((out_dim,), dtype)) if use_bias else None

    def __call__(self, x_TI: Float[Array, "T I"]) -> Float[Array, "T O"]:
        """For weights split by rows, or not at all: the local part of the output."""
        return apply_linears(x_TI, self)[0]

    def reduced(self, x_TI: Float[Array, "T I"], reduce: Reduce) -> Float[Array, "T O"]:
        """For weights split by columns: the whole output, summed by `reduce`.

        Partial sums travel in the model's dtype: that halves the bytes, and rounding each of them costs no more than
        rounding the result does.
        """
        (y_TO,) = project(x_TI, (self.weight[...],))
        return self.add_bias(reduce(y_TO))

    def add_bias(self, y_TO: Float[Array, "T O"]) -> Float[Array, "T O"]:
        """The product with the bias added, if there is one."""
        return y_TO if self.bias is None else y_TO + self.bias[...][None, :]


def apply_linears(x_TI: Float[Array, "T I"], *linears: Linear) -> tuple[Float[Array, "T _"], ...]:
    """What each of them gives for the same input, by one product where that is faster."""
    products = project(x_TI, tuple(linear.weight[...] for linear in linears))
    return tuple(linear.add_bias(y_TO) for linear, y_TO in zip(linears, products, strict=True))


class RMSNorm(nnx.Module):
    """Root mean square normalization (Zhang and Sennrich 2019), in float32."""

    def __init__(self, dim: int, *, eps: float, dtype: jnp.dtype) -> None:
        self.weight = nnx.Param(jnp.ones((dim,), dtype))
        self.eps = eps

    def __call__(self, x_TD: Float[Array, "T D"]) -> Float[Array, "T D"]:
        x32_TD = x_TD.astype(jnp.float32)
        mean_square_T1 = jnp.mean(jnp.square(x32_TD), axis=-1, keepdims=True)
        normed_TD = x32_TD * jax.lax.rsqrt(mean_square_T1 + jnp.float32(self.eps))
        return (normed_TD * self.weight[...].astype(jnp.float32)[None, :]).astype(x_TD.dtype)


class Attention(nnx.Module):
    """Projections around the attention callback."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        linear = functools.partial(Linear, use_bias=config.attention_bias, dtype=dtype, rngs=rngs)
        q_dim, kv_dim = config.num_q_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = linear(config.hidden_size, q_dim)
        self.k_proj = linear(config.hidden_size, kv_dim)
        self.v_proj = linear(config.hidden_size, kv_dim)
        self.o_proj = linear(q_dim, config.hidden_size)
        self.head_dim = config.head_dim

    def __call__(
        self,
        layer: int,
        x_TD: Float[Array, "T D"],
        rotation_TR: tuple[Float[Array, "T R"], Float[Array, "T R"]],
        attend: Attend,
        reduce: Reduce,
        carry: Carry,
    ) -> tuple[Float[Array, "T D"], Carry]:
        num_tokens = x_TD.shape[0]
        with jax.named_scope("qkv_proj"):
            q_TNH, k_TKH, v_TKH = (
                y.reshape(num_tokens, -1, self.head_dim)
                for y in apply_linears(x_TD, self.q_proj, self.k_proj, self.v_proj)
            )
        with jax.named_scope("rope"):
            q_TNH, k_TKH = apply_rope(q_TNH, rotation_TR), apply_rope(k_TKH, rotation_TR)
        with jax.named_scope("attend"):
            o_TNH, carry = attend(layer, q_TNH, k_TKH, v_TKH, carry)
        with jax.named_scope("o_proj"):
            return self.o_proj.reduced(o_TNH.reshape(num_tokens, -1), reduce), carry


class FeedForward(nnx.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        linear = functools.partial(Linear, use_bias=config.mlp_bias, dtype=dtype, rngs=rngs)
        self.gate_proj = linear(config.hidden_size, config.intermediate_size)
        self.up_proj = linear(config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x_TD: Float[Array, "T D"], reduce: Reduce) -> Float[Array, "T D"]:
        with jax.named_scope("gate_up_proj"):
            if self.gate_proj.bias is None:
                x_TF = project_gated(x_TD, self.gate_proj.weight[...], self.up_proj.weight[...])
            else:
                gate_TF, up_TF = apply_linears(x_TD, self.gate_proj, self.up_proj)
                x_TF = jax.nn.silu(gate_TF) * up_TF
        with jax.named_scope("down_proj"):
            return self.down_proj.reduced(x_TF, reduce)


class DecoderLayer(nnx.Module):
    """Attention and feed-forward, each normalized before and added to the residual stream after."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.self_attn = Attention(config, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.mlp = FeedForward(config, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        layer: int,
        x_TD: Float[Array, "T D"],
        rotation_TR: tuple[Float[Array, "T R"], Float[Array, "T R"]],
        attend: Attend,
        reduce: Reduce,
        carry: Carry,
    ) -> tuple[Float[Array, "T D"], Carry]:
        with jax.named_scope("input_norm"):
            normed_TD = self.input_layernorm(x_TD)
        delta_TD, carry = self.self_attn(layer, normed_TD, rotation_TR, attend, reduce, carry)
        x_TD = x_TD + delta_TD
        with jax.named_scope("post_attention_norm"):
            normed_TD = self.post_attention_layernorm(x_TD)
        return x_TD + self.mlp(normed_TD, reduce), carry


class Embedding(nnx.Module):
    """Token embeddings [V, D], split over the vocabulary."""

    def __init__(self, vocab_size: int, dim: int, *, dtype: jnp.dtype, tp_axis: str | None, rngs: nnx.Rngs) -> None:
        init = jax.nn.initializers.normal(stddev=dim**-0.5)
        self.weight = nnx.Param(init(rngs.params(), (vocab_size, dim), dtype))
        self.tp_axis = tp_axis

    def __call__(self, token_ids_T: Int32[Array, " T"], reduce: Reduce) -> Float[Array, "T D"]:
        weight_VD = self.weight[...]
        if self.tp_axis is None:
            return weight_VD[token_ids_T]
        num_rows = weight_VD.shape[0]
        rows_T = token_ids_T - jax.lax.axis_index(self.tp_axis) * num_rows
        is_local_T = (rows_T >= 0) & (rows_T < num_rows)
        x_TD = jnp.where(is_local_T[:, None], weight_VD[jnp.clip(rows_T, 0, num_rows - 1)], 0)
        return reduce(x_TD)


class Llama(nnx.Module):
    """A Llama. Its parameters, as made here, have logical shapes: unsharded, the vocabulary padded to `tp`.

    To run it, split it with `nnx.split`, and inside `shard_map` merge it again with the local shards that
    `loongjax.models.sharding.partition_specs` describes.

    Args:
        config: its shape.
        dtype: of parameters and activations. Matrix products accumulate in float32 whatever it is; with float32 they
            are computed at the highest precision.
        tp: degree of tensor parallelism; raises ConfigError if the model cannot be cut so.
        tp_axis: mesh axis of tensor parallelism; None: no collectives.
        rngs: of the random initial weights, stream "params".
    """

    def __init__(
        self, config: ModelConfig, *, dtype: Any, tp: int = 1, tp_axis: str | None = None, rngs: nnx.Rngs
    ) -> None:
        config.check_tp(tp)
        dtype = jnp.dtype(dtype)
        vocab_size = config.padded_vocab_size(tp)
        self.config = config
        self.tp_axis = tp_axis
        self.embed_tokens = Embedding(vocab_size, config.hidden_size, dtype=dtype, tp_axis=tp_axis, rngs=rngs)
        self.layers = nnx.List([DecoderLayer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_layers)])
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.lm_head = (
            None if config.tie_word_embeddings else Linear(config.hidden_size, vocab_size, dtype=dtype, rngs=rngs)
        )

    def hidden(
        self,
        token_ids: Int32[Array, " T"],
        positions: Int32[Array, " T"],
        attend: Attend,
        carry: Carry,
        *,
        reduce: Reduce | None = None,
    ) -> tuple[Float[Array, "T D"], Carry]:
        """Final hidden states, normalized, the same on every device of `tp_axis`.

        Args:
            token_ids: ids within the vocabulary.
            positions: from 0, of each token in its own sequence.
            attend: attention of one layer over whatever keys the caller keeps.
            carry: threaded through all layers by `attend`.
            reduce: sums over `tp_axis`; None: `jax.lax.psum`.
        """
        reduce = self._psum if reduce is None else reduce
        with jax.named_scope("embed"):
            x_TD = self.embed_tokens(token_ids, reduce)
        with jax.named_scope("rotation"):
            rotation_TR = rotation(self.config.rope, self.config.head_dim, positions)
        for index, layer in enumerate(self.layers):
            with jax.named_scope(f"layer_{index}"):
                x_TD, carry = layer(index, x_TD, rotation_TR, attend, reduce, carry)
        with jax.named_scope("final_norm"):
            return self.norm(x_TD), carry

    def logits(self, hidden: Float[Array, "T D"]) -> Float[Array, "T V"]:
        """float32 logits of this device's part of the vocabulary; ids beyond `config.vocab_size` get -inf."""
        with jax.named_scope("lm_head"):
            weight = self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
            (logits_TV,) = project(hidden, (weight[...],), out_dtype=jnp.float32)
            num_columns = logits_TV.shape[1]
            first = 0 if self.tp_axis is None else jax.lax.axis_index(self.tp_axis) * num_columns
            is_padding_V = first + jnp.arange(num_columns) >= self.config.vocab_size
            return jnp.where(is_padding_V[None, :], -jnp.inf, logits_TV)

    def _psum(self, x_TD: Float[Array, "T D"]) -> Float[Array, "T D"]:
        return x_TD if self.tp_axis is None else jax.lax.psum(x_TD, self.tp_axis)
