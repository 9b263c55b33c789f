"""The striped layout (Striped Attention, arXiv:2311.09431): token i of a packed batch is on rank i mod n, at i // n.

Every rank has its share of every part of every sequence, so that causal work is even on each ring step, and keeps its
tokens in global order, so that what a row sees of any rank's keys is one contiguous range.

Every row carries `row_start`, the packed index of the first token of its request. A row whose `row_start` exceeds its
own packed index is padding: it sees nothing. Keys of padding are never seen, because no request reaches over them.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, Shaped

PADDING_ROW = np.int32(np.iinfo(np.int32).max)
"""The `row_start` of a padding row."""


def local_length(num_tokens: int, num_ranks: int) -> int:
    """Rows that each rank needs for so many tokens."""
    return -(-num_tokens // num_ranks)


def stripe(
    tokens: Shaped[np.ndarray, "T *rest"], num_ranks: int, *, fill: int | float, rows: int | None = None
) -> Shaped[np.ndarray, "n T_local *rest"]:
    """What each rank holds of a packed array.

    Args:
        tokens: one entry a token.
        num_ranks: n.
        fill: the value of padding.
        rows: T_local; the fewest that hold all tokens if None.

    Raises:
        ValueError: more tokens than `rows` can hold.
    """
    num_tokens = tokens.shape[0]
    rows = local_length(num_tokens, num_ranks) if rows is None else rows
    if num_tokens > rows * num_ranks:
        raise ValueError(f"{num_tokens} tokens do not fit {num_ranks} ranks of {rows} rows")
    padded = np.full((rows * num_ranks, *tokens.shape[1:]), fill, tokens.dtype)
    padded[:num_tokens] = tokens
    return np.ascontiguousarray(padded.reshape(rows, num_ranks, *tokens.shape[1:]).swapaxes(0, 1))


def unstripe(striped: Shaped[np.ndarray, "n T_local *rest"], num_tokens: int) -> Shaped[np.ndarray, "T *rest"]:
    """The packed array of which `stripe` made this, without the padding."""
    return striped.swapaxes(0, 1).reshape(-1, *striped.shape[2:])[:num_tokens]


def stripe_row_starts(seq_lens: Sequence[int], num_ranks: int, *, rows: int | None = None) -> np.ndarray:
    """`row_starts` of each rank, int32 [n, T_local], for requests of these lengths packed one after another."""
    lengths = np.asarray(seq_lens, np.int32)
    starts = np.repeat(np.cumsum(lengths, dtype=np.int32) - lengths, lengths)
    return stripe(starts, num_ranks, fill=int(PADDING_ROW), rows=rows)


def visible_ranges(
    row_starts: Int32[Array, "T"],
    rank: Int32[Array, ""] | int,
    source_rank: Int32[Array, ""] | int,
    num_ranks: int,
) -> tuple[Int32[Array, "T"], Int32[Array, "T"]]:
    """Which keys of `source_rank` the rows of `rank` see: k_start and k_end of `prefill_attention`.

    The key at local index j of rank r has packed index j * n + r, and a row sees it if this lies between the row's
    start and the row's own packed index, both included.
    """
    own = jnp.arange(row_starts.shape[0], dtype=jnp.int32) * num_ranks + rank
    start = jnp.minimum(row_starts, own + 1)
    k_start = (start - source_rank + num_ranks - 1) // num_ranks
    k_end = (own - source_rank) // num_ranks + 1
    return k_start, k_end
