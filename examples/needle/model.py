"""A small Llama as a pure function over a dictionary of arrays named as in a Hugging Face checkpoint.

Shapes: B sequences, T tokens, N query heads, K KV heads, H head dim, D model dim, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from safetensors.flax import load_file, save_file

from needle.tokenizer import BOS_ID, EOS_ID, VOCAB_SIZE

Params = dict[str, Array]
Attend = Callable[[Array, Array, Array], Array]
"""Causal attention: q [B, T, N, H], k and v [B, T, K, H] -> [B, T, N, H]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The sizes that a Llama has; `hugging_face` gives the config.json that says the same."""

    num_layers: int = 3
    hidden_size: int = 128
    intermediate_size: int = 384
    num_q_heads: int = 4
    num_kv_heads: int = 4
    head_dim: int = 32
    vocab_size: int = VOCAB_SIZE
    rope_theta: float = 1e8
    rms_norm_eps: float = 1e-5
    max_model_len: int = 16384
    """Longest sequence, in tokens."""

    def hugging_face(self) -> dict[str, object]:
        """config.json; `rope_theta` stands in both places where readers of different ages look."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_q_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_model_len,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "bos_token_id": BOS_ID,
            "eos_token_id": EOS_ID,
            "dtype": "bfloat16",
        }


QUERY_BLOCK = 512
SHORT_LENGTH = 2048
"""Tokens up to which attention weights are kept for the gradient; above, they are computed twice to save memory."""


def param_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter's shape, [outputs, inputs], by its name in the checkpoint."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_q_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_layers):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (hidden,),
                "self_attn.q_proj": (q_size, hidden),
                "self_attn.k_proj": (kv_size, hidden),
                "self_attn.v_proj": (kv_size, hidden),
                "self_attn.o_proj": (hidden, q_size),
                "post_attention_layernorm": (hidden,),
                "mlp.gate_proj": (ffn, hidden),
                "mlp.up_proj": (ffn, hidden),
                "mlp.down_proj": (hidden, ffn),
            }.items()
        }
    return shapes | {"model.norm.weight": (hidden,)}


def hidden_states(
    params: Params, config: ModelConfig, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], attend: Attend
) -> Float[Array, "B T D"]:
    """The normalised output of the last layer, in the parameters' dtype."""
    x_BTD = params["model.embed_tokens.weight"][tokens]
    angles_BTR = (
        positions[..., None].astype(jnp.float32) * jnp.asarray(rope_frequencies(config), jnp.float32)[None, None]
    )
    cos_BTR, sin_BTR = jnp.cos(angles_BTR), jnp.sin(angles_BTR)
    for layer in range(config.num_layers):
        weights = {
            name.removeprefix(prefix).removesuffix(".weight"): value
            for prefix in [f"model.layers.{layer}."]
            for name, value in params.items()
            if name.startswith(prefix)
        }
        y_BTD = rms_norm(x_BTD, weights["input_layernorm"], config.rms_norm_eps)
        q_BTNH, k_BTKH, v_BTKH = (
            _project(y_BTD, weights[f"self_attn.{name}_proj"]).reshape(*tokens.shape, -1, config.head_dim)
            for name in "qkv"
        )
        out_BTNH = attend(apply_rope(q_BTNH, cos_BTR, sin_BTR), apply_rope(k_BTKH, cos_BTR, sin_BTR), v_BTKH)
        x_BTD += _project(out_BTNH.reshape(*tokens.shape, -1), weights["self_attn.o_proj"])
        y_BTD = rms_norm(x_BTD, weights["post_attention_layernorm"], config.rms_norm_eps)
        gate_BTF = jax.nn.silu(_project(y_BTD, weights["mlp.gate_proj"]))
        x_BTD += _project(gate_BTF * _project(y_BTD, weights["mlp.up_proj"]), weights["mlp.down_proj"])
    return rms_norm(x_BTD, params["model.norm.weight"], config.rms_norm_eps)


def logits(params: Params, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """Scores of the next token in float32, from the tied embedding."""
    embedding_VD = params["model.embed_tokens.weight"]
    return jnp.einsum("btd,vd->btv", hidden, embedding_VD, preferred_element_type=jnp.float32)


def plain_attention(q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]) -> Array:
    """Causal attention as its formula reads, a block of queries after the other."""
    length = q.shape[1]
    blocks = [(start, min(start + QUERY_BLOCK, length)) for start in range(0, length, QUERY_BLOCK)]
    attend = _attend_block if length <= SHORT_LENGTH else jax.checkpoint(_attend_block)
    return jnp.concatenate([attend(q[:, a:b], k[:, :b], v[:, :b]) for a, b in blocks], axis=1)


def _attend_block(q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"]) -> Array:
    """The last T of S tokens attend, with float32 scores."""
    group = q.shape[2] // k.shape[2]
    k_BSNH, v_BSNH = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
    scores = jnp.einsum("btnh,bsnh->bnts", q, k_BSNH, preferred_element_type=jnp.float32) * q.shape[3] ** -0.5
    is_visible = jnp.tri(q.shape[1], k.shape[1], k.shape[1] - q.shape[1], dtype=bool)
    weights = jax.nn.softmax(jnp.where(is_visible[None, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bnts,bsnh->btnh", weights.astype(v.dtype), v_BSNH)


def cudnn_attention(q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]) -> Array:
    """Causal attention by cuDNN's fused kernel, in linear memory: bfloat16 on a GPU only."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def rms_norm(x: Float[Array, "B T D"], weight: Float[Array, " D"], eps: float) -> Float[Array, "B T D"]:
    """Root-mean-square normalisation in float32."""
    x_float32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x_float32), axis=-1, keepdims=True) + eps)
    return (x_float32 * scale).astype(x.dtype) * weight[None, None]


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """float64 [H / 2]: radians a token."""
    return config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)


def apply_rope(x: Float[Array, "B T N H"], cos: Float[Array, "B T R"], sin: Float[Array, "B T R"]) -> Array:
    """Rotates each pair (i, i + R) of a head of H = 2 R dimensions, as Hugging Face's Llama does; in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def save_checkpoint(params: Params, config: ModelConfig, folder: Path) -> None:
    """Writes config.json, generation_config.json and bfloat16 model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    generation = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "do_sample": False}
    (folder / "config.json").write_text(json.dumps(config.hugging_face(), indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    weights = {name: value.astype(jnp.bfloat16) for name, value in params.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def load_params(folder: Path) -> Params:
    """The parameters of a checkpoint, in float32."""
    return {name: value.astype(jnp.float32) for name, value in load_file(folder / "model.safetensors").items()}


def _project(x: Float[Array, "B T I"], weight: Float[Array, "O I"]) -> Float[Array, "B T O"]:
    return jnp.einsum("bti,oi->bto", x, weight)
