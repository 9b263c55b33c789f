"""Model shapes by name: random weights of them take as long as a checkpoint's, and need no checkpoint."""

from __future__ import annotations

from loongjax.errors import ConfigError
from loongjax.models.config import ModelConfig

SHAPES = {
    "llama2-7b": ModelConfig(
        hidden_size=4096,
        num_layers=32,
        num_q_heads=32,
        num_kv_heads=32,
        head_dim=128,
        intermediate_size=11008,
        vocab_size=32000,
        max_position_embeddings=1_048_576,
        dtype="bfloat16",
    ),
    "llama3-8b": ModelConfig(
        hidden_size=4096,
        num_layers=32,
        num_q_heads=32,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=14336,
        vocab_size=128256,
        max_position_embeddings=1_048_576,
        dtype="bfloat16",
    ),
    "tiny": ModelConfig(
        hidden_size=64,
        num_layers=2,
        num_q_heads=8,
        num_kv_heads=4,
        head_dim=8,
        intermediate_size=128,
        vocab_size=320,
        max_position_embeddings=1_048_576,
    ),
}


def named_shape(name: str) -> ModelConfig:
    """Raises ConfigError for a name that is not known."""
    if name not in SHAPES:
        raise ConfigError(f"there is no model shape {name!r}: --random-weights takes {', '.join(SHAPES)}")
    return SHAPES[name]
