"""The shapes of known models, by name. No JAX, so that a simulation needs none."""

from __future__ import annotations

from loongjax.costmodel.model_shape import ModelShape

MODEL_SHAPES = {
    "llama2-7b": ModelShape(
        hidden_size=4096,
        num_layers=32,
        num_q_heads=32,
        num_kv_heads=32,
        head_dim=128,
        intermediate_size=11008,
        vocab_size=32000,
    ),
    "llama3-8b": ModelShape(
        hidden_size=4096,
        num_layers=32,
        num_q_heads=32,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=14336,
        vocab_size=128256,
    ),
    "tiny": ModelShape(
        hidden_size=64,
        num_layers=2,
        num_q_heads=8,
        num_kv_heads=4,
        head_dim=8,
        intermediate_size=128,
        vocab_size=320,
        dtype_bytes=4,
    ),
}
