"""Attention by loops in float64: what every variant of every op is held against."""

import numpy as np


def attend_row(
    q: np.ndarray, keys: np.ndarray, values: np.ndarray, sm_scale: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """One query token [N, H] over all of these keys [S, K, H]: output [N, H] and log-sum-exp [N]."""
    num_q_heads, head_dim = q.shape
    group_size = num_q_heads // keys.shape[1]
    scale = head_dim**-0.5 if sm_scale is None else sm_scale
    o = np.zeros((num_q_heads, head_dim))
    lse = np.full(num_q_heads, -np.inf)
    if len(keys) == 0:
        return o, lse
    for head in range(num_q_heads):
        kv_head = head // group_size
        scores = scale * keys[:, kv_head].astype(np.float64) @ q[head].astype(np.float64)
        lse[head] = np.logaddexp.reduce(scores)
        o[head] = np.exp(scores - lse[head]) @ values[:, kv_head].astype(np.float64)
    return o, lse


def attend_ranges(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, k_start: np.ndarray, k_end: np.ndarray, sm_scale: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """`prefill_attention`, row by row."""
    ranges = [slice(max(start, 0), max(end, 0)) for start, end in zip(k_start, k_end, strict=True)]
    rows = [attend_row(row, k[seen], v[seen], sm_scale) for row, seen in zip(q, ranges, strict=True)]
    return np.array([o for o, _ in rows]), np.array([lse for _, lse in rows])


def attend_sequences(q: np.ndarray, k: np.ndarray, v: np.ndarray, seq_lens: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Causal attention within each of the sequences packed one after another."""
    starts = np.repeat(np.cumsum(seq_lens) - seq_lens, seq_lens)
    return attend_ranges(q, k, v, starts, np.arange(len(q)) + 1)
