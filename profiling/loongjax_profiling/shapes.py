"""Model configurations by name: random weights of them take as long as a checkpoint's, and need no checkpoint."""

from __future__ import annotations

from loongjax.costmodel.model_shape import ModelShape
from loongjax.errors import ConfigError
from loongjax.models.config import ModelConfig
from loongjax_profiling.model_shapes import MODEL_SHAPES

MAX_POSITION_EMBEDDINGS = 1_048_576
"""Random weights know no longest context: what the pool holds may be measured."""


def _config(shape: ModelShape) -> ModelConfig:
    return ModelConfig(
        hidden_size=shape.hidden_size,
        num_layers=shape.num_layers,
        num_q_heads=shape.num_q_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate_size,
        vocab_size=shape.vocab_size,
        max_position_embeddings=MAX_POSITION_EMBEDDINGS,
        dtype={2: "bfloat16", 4: "float32"}[shape.dtype_bytes],
    )


SHAPES = {name: _config(shape) for name, shape in MODEL_SHAPES.items()}
"""Every known shape, as a model's configuration."""


def named_shape(name: str) -> ModelConfig:
    """Raises ConfigError for a name that is not known."""
    if name not in SHAPES:
        raise ConfigError(f"there is no model shape {name!r}: --random-weights takes {', '.join(SHAPES)}")
    return SHAPES[name]
