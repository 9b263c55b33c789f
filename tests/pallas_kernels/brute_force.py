"""Attention by loops in float64: what every variant of every op is held against."""

import numpy as np


def attend_rows(
    q: np.ndarray, keys: np.ndarray, values: np.ndarray, sm_scale: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Query tokens [T, N, H] that see all of these keys [S, K, H]: output [T, N, H] and log-sum-exp [T, N]."""
    num_rows, num_q_heads, head_dim = q.shape
    scale = head_dim**-0.5 if sm_scale is None else sm_scale
    o = np.zeros(q.shape)
    lse = np.full((num_rows, num_q_heads), -np.inf)
    if len(keys) == 0:
        return o, lse
    group_size = num_q_heads // keys.shape[1]
    for kv_head in range(keys.shape[1]):
        k, v = (x[:, kv_head].astype(np.float64) for x in (keys, values))
        for head in range(kv_head * group_size, (kv_head + 1) * group_size):
            scores = scale * q[:, head].astype(np.float64) @ k.T
            lse[:, head] = np.logaddexp.reduce(scores, axis=1)
            o[:, head] = np.exp(scores - lse[:, head, None]) @ v
    return o, lse


def attend_row(
    q: np.ndarray, keys: np.ndarray, values: np.ndarray, sm_scale: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """`attend_rows` of one query token [N, H]: output [N, H] and log-sum-exp [N]."""
    o, lse = attend_rows(q[None], keys, values, sm_scale)
    return o[0], lse[0]


def attend_requests(
    q: np.ndarray, q_lens: list[int], keys: list[np.ndarray], values: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """`extend_attention`: the query tokens of each request over its keys; none behind those of the last one."""
    o, lse = np.zeros(q.shape), np.full(q.shape[:2], -np.inf)
    for begin, q_len, k, v in zip(np.cumsum(q_lens) - q_lens, q_lens, keys, values, strict=True):
        rows = slice(begin, begin + q_len)
        o[rows], lse[rows] = attend_rows(q[rows], k, v)
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
