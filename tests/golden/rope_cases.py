"""Rope settings at the sizes of real models, as config.json has them, for the golden files' maker and for tests."""

from __future__ import annotations

from typing import Any

_SIZES = {"hidden_size": 4096, "num_attention_heads": 32, "head_dim": 128}


def _case(max_position_embeddings: int, head_dim: int = 128, **rope: Any) -> dict[str, Any]:
    sizes = _SIZES | {"head_dim": head_dim, "max_position_embeddings": max_position_embeddings}
    return sizes | {"rope_parameters": rope}


_YARN: dict[str, Any] = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 16.0}

ROPE_CASES: dict[str, dict[str, Any]] = {
    "default": _case(4096, rope_type="default", rope_theta=10000.0),
    "default_long": _case(1048576, rope_type="default", rope_theta=50000000.0),
    "default_head_dim": _case(4096, head_dim=80, rope_type="default", rope_theta=1000000.0),
    "linear": _case(4096, rope_type="linear", rope_theta=10000.0, factor=4.0),
    "linear_fraction": _case(4096, rope_type="linear", rope_theta=10000.0, factor=2.5),
    "llama3": _case(
        131072,
        rope_type="llama3",
        rope_theta=500000.0,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    ),
    "llama3_small": _case(
        131072,
        head_dim=64,
        rope_type="llama3",
        rope_theta=500000.0,
        factor=32.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    ),
    "yarn": _case(65536, **_YARN, original_max_position_embeddings=4096),
    "yarn_original_by_default": _case(65536, **_YARN),
    "yarn_attention_factor": _case(65536, **_YARN, original_max_position_embeddings=4096, attention_factor=1.5),
    "yarn_betas": _case(65536, **_YARN, original_max_position_embeddings=4096, beta_fast=20.0, beta_slow=3.0),
    "yarn_mscales": _case(65536, **_YARN, original_max_position_embeddings=4096, mscale=0.707, mscale_all_dim=1.2),
    "yarn_mscale_alone": _case(65536, **_YARN, original_max_position_embeddings=4096, mscale=0.707),
    "yarn_untruncated": _case(65536, **_YARN, original_max_position_embeddings=4096, truncate=False),
    "yarn_short": _case(64, head_dim=16, **_YARN, original_max_position_embeddings=4),
}
