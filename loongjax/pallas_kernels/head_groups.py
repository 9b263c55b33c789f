"""Grouped queries: N query heads share K heads of keys and values, N // K each, and no key is ever repeated."""

from __future__ import annotations


def check_heads(op: str, q_shape: tuple[int, ...], kv_shape: tuple[int, ...]) -> None:
    """Raises ValueError where queries [..., N, H] cannot attend to keys [..., K, H]."""
    num_q_heads, head_dim = q_shape[-2:]
    num_kv_heads, kv_head_dim = kv_shape[-2:]
    if head_dim != kv_head_dim:
        raise ValueError(f"{op}: queries have head_dim {head_dim}, keys {kv_head_dim}; they must be equal")
    if num_kv_heads == 0 or num_q_heads % num_kv_heads:
        raise ValueError(f"{op}: query heads must be a multiple of KV heads, got {num_q_heads} and {num_kv_heads}")


def check_dtypes(op: str, q_dtype: object, kv_dtype: object) -> None:
    """Raises ValueError where queries and keys differ in dtype: which one to round is the caller's choice."""
    if q_dtype != kv_dtype:
        raise ValueError(f"{op}: queries and keys must have one dtype, got {q_dtype} and {kv_dtype}")
