"""What a Llama checkpoint's config.json says, checked, in either form that Hugging Face has written.

Version 4 of transformers wrote `rope_theta`, `rope_scaling` (with `type` or `rope_type`) and `torch_dtype`; version 5
writes `rope_parameters` and `dtype`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from loongjax.errors import CheckpointError, ConfigError
from loongjax.models.rope import LinearRope, Llama3Rope, Rope, YarnRope

ARCHITECTURE = "LlamaForCausalLM"
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a Llama and the constants of its arithmetic."""

    hidden_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    """Width of the feed-forward layer."""
    vocab_size: int
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    """The output layer uses the embedding's weights."""
    attention_bias: bool = False
    """The four projections of attention have biases."""
    mlp_bias: bool = False
    """The three projections of the feed-forward layer have biases."""
    max_position_embeddings: int = 2048
    rope: Rope = dataclasses.field(default_factory=Rope)
    dtype: str = "float32"
    """Of the checkpoint's tensors, by its own account: one of DTYPES."""

    def __post_init__(self) -> None:
        for name in (
            "hidden_size",
            "num_layers",
            "num_q_heads",
            "num_kv_heads",
            "head_dim",
            "intermediate_size",
            "vocab_size",
            "max_position_embeddings",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_q_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_q_heads ({self.num_q_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even for rotary embedding, got {self.head_dim}")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")

    @classmethod
    def from_checkpoint(cls, checkpoint_dir: Path | str) -> ModelConfig:
        """Reads `checkpoint_dir`/config.json.

        Raises:
            CheckpointError: no such folder or file, or it is not what this engine can serve.
        """
        path = Path(checkpoint_dir) / "config.json"
        raw = read_json_object(path)
        try:
            return cls.from_dict(raw)
        except (ConfigError, CheckpointError) as error:
            raise CheckpointError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """The same, from the parsed config.json.

        Raises:
            CheckpointError, ConfigError: what was found, and what would work.
        """
        _refuse_unsupported(raw)
        hidden_size = _number(raw, "hidden_size", int)
        num_q_heads = _number(raw, "num_attention_heads", int)
        if not raw.get("head_dim") and (num_q_heads < 1 or hidden_size % num_q_heads):
            raise CheckpointError(
                f"hidden_size ({hidden_size}) is no multiple of num_attention_heads ({num_q_heads}), "
                "so head_dim has to be given"
            )
        max_position_embeddings = _number(raw, "max_position_embeddings", int, 2048)
        return cls(
            hidden_size=hidden_size,
            num_layers=_number(raw, "num_hidden_layers", int),
            num_q_heads=num_q_heads,
            num_kv_heads=_number(raw, "num_key_value_heads", int, num_q_heads),
            head_dim=_number(raw, "head_dim", int, 0) or hidden_size // num_q_heads,
            intermediate_size=_number(raw, "intermediate_size", int),
            vocab_size=_number(raw, "vocab_size", int),
            rms_norm_eps=_number(raw, "rms_norm_eps", float, 1e-6),
            tie_word_embeddings=_flag(raw, "tie_word_embeddings"),
            attention_bias=_flag(raw, "attention_bias"),
            mlp_bias=_flag(raw, "mlp_bias"),
            max_position_embeddings=max_position_embeddings,
            rope=_rope(raw, max_position_embeddings),
            dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch."),
        )

    @property
    def context_len(self) -> int:
        """Tokens that the model is meant to reach, rope scaling included."""
        return self.rope.context_len(self.max_position_embeddings)

    @property
    def jax_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)

    def padded_vocab_size(self, tp: int) -> int:
        """The vocabulary, rounded up to a multiple of `tp`."""
        return -(-self.vocab_size // tp) * tp

    @property
    def possible_tps(self) -> tuple[int, ...]:
        """Over how many devices the model can be cut, ascending."""
        common = math.gcd(self.num_q_heads, self.num_kv_heads, self.intermediate_size)
        return tuple(tp for tp in range(1, common + 1) if common % tp == 0)

    def check_tp(self, tp: int) -> None:
        """Raises ConfigError, naming the tps that would work, unless `tp` divides heads, KV heads and ffn."""
        dims = {
            "query heads": self.num_q_heads,
            "KV heads": self.num_kv_heads,
            "intermediate_size": self.intermediate_size,
        }
        if tp >= 1 and not any(size % tp for size in dims.values()):
            return
        works = ", ".join(map(str, self.possible_tps))
        sizes = ", ".join(f"{size} {name}" for name, size in dims.items())
        raise ConfigError(f"tp={tp} does not divide this model ({sizes}); a tp that works: {works}")


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint. Raises CheckpointError naming it."""
    if not path.parent.is_dir():
        raise CheckpointError(f"{path.parent} is not a folder; give the path of a Hugging Face checkpoint's folder")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}, so it is not a Hugging Face checkpoint") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(raw).__name__}")
    return raw


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    architectures = raw.get("architectures") or []
    model_type = raw.get("model_type", "llama")
    if (architectures and architectures != [ARCHITECTURE]) or model_type != "llama":
        raise CheckpointError(
            f"architectures {architectures} with model_type {model_type!r} are not supported; "
            f"only ['{ARCHITECTURE}'] with 'llama' is"
        )
    activation = raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise CheckpointError(f"hidden_act {activation!r} is not supported; only 'silu' is")
    for name, remedy in (
        ("quantization_config", "use the unquantized checkpoint"),
        ("sliding_window", "only full attention is"),
        ("attention_chunk_size", "only full attention is"),
    ):
        if raw.get(name) is not None:
            raise CheckpointError(f"{name} ({raw[name]}) is not supported; {remedy}")


def _rope(raw: Mapping[str, Any], max_position_embeddings: int) -> Rope:
    """The rotary embedding of either form, with the defaults that transformers fills in."""
    found = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(found, Mapping):
        raise CheckpointError(f"rope_parameters must be an object, got {found!r}")
    params = {"rope_theta": raw.get("rope_theta"), "partial_rotary_factor": raw.get("partial_rotary_factor")}
    params |= {name: value for name, value in found.items() if value is not None}
    if params["partial_rotary_factor"] not in (None, 1, 1.0):
        raise CheckpointError(f"partial_rotary_factor {params['partial_rotary_factor']} is not supported; only 1 is")
    if raw.get("original_max_position_embeddings") is not None:
        params["original_max_position_embeddings"] = raw["original_max_position_embeddings"]
    kind = params.get("rope_type", params.get("type", "default"))
    theta = _number(params, "rope_theta", float, 10000.0)
    if kind == "default":
        return Rope(theta=theta)
    if kind == "linear":
        return LinearRope(theta=theta, factor=_number(params, "factor", float))
    if kind not in ("llama3", "yarn"):
        raise CheckpointError(f"rope type {kind!r} is not supported; those that are: default, linear, llama3, yarn")
    original = _number(params, "original_max_position_embeddings", int, max_position_embeddings)
    if kind == "llama3":
        return Llama3Rope(
            theta=theta,
            factor=_number(params, "factor", float),
            low_freq_factor=_number(params, "low_freq_factor", float),
            high_freq_factor=_number(params, "high_freq_factor", float),
            original_max_position_embeddings=original,
        )
    return YarnRope(
        theta=theta,
        factor=_number(params, "factor", float, max_position_embeddings / original),
        original_max_position_embeddings=original,
        explicit_attention_factor=_number(params, "attention_factor", float, None),
        mscale=_number(params, "mscale", float, None),
        mscale_all_dim=_number(params, "mscale_all_dim", float, None),
        beta_fast=_number(params, "beta_fast", float, 0.0) or 32.0,
        beta_slow=_number(params, "beta_slow", float, 0.0) or 1.0,
        truncate=_flag(params, "truncate", default=True),
    )


_REQUIRED = object()


def _number(raw: Mapping[str, Any], name: str, kind: type, default: Any = _REQUIRED) -> Any:
    """The number called `name`, or its default where it is absent or null."""
    value = raw.get(name)
    if value is None:
        if default is _REQUIRED:
            raise CheckpointError(f"{name} is missing")
        return default
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or (kind is int and value != int(value)):
        expected = "an integer" if kind is int else "a number"
        raise CheckpointError(f"{name} must be {expected}, got {value!r}")
    return kind(value)


def _flag(raw: Mapping[str, Any], name: str, *, default: bool = False) -> bool:
    value = raw.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise CheckpointError(f"{name} must be true or false, got {value!r}")
    return value
