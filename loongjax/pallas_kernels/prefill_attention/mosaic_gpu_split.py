"""How few query rows over many keys keep all thread blocks of Hopper's kernel busy.

A thread block takes 128 rows of one head, so a chunk of 32 rows with 32 heads is 32 blocks, three quarters empty, for
132 multiprocessors. Two things help: heads that share keys share a block, and each row's keys are cut into parts, which
different thread blocks attend to, and whose results are merged.
"""

import itertools
import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Shaped

MOST_PARTS = 16
LEAST_PART = 2048
"""Keys of a part: about 25 us of a thread block, several times what a merge takes."""
LEAST_GAIN = 0.05
"""Of the time, for which more parts are worth it."""
MOST_FOLDED_ROWS = 512
"""Of several requests: moving queries and outputs of more rows takes longer than may be gained."""


def folds_heads(
    num_rows: int, num_q_heads: int, num_kv_heads: int, num_keys: int, block_q: int, num_requests: int
) -> bool:
    """Whether the query heads of a KV head lie side by side in a block of rows, where there are keys to cut.

    That makes fewer blocks of few rows. Of more it makes as many, each of which holds rows of fewer requests, and so
    visits the keys of fewer: four requests of 32 rows with 4 heads each then have a block of their own.
    """
    if num_q_heads == num_kv_heads or num_keys < 2 * LEAST_PART:
        return False
    if num_rows < block_q:
        return -(-num_rows * num_q_heads // num_kv_heads // block_q) * num_kv_heads < num_q_heads
    return num_rows <= MOST_FOLDED_ROWS and num_rows < num_requests * block_q


def fold_heads(per_head: Shaped[Array, "T N *rest"], num_kv_heads: int) -> Shaped[Array, "T_G K *rest"]:
    """The query heads of a KV head as rows, one beside the other."""
    T, N, *rest = per_head.shape
    by_kv_head = per_head.reshape(T, num_kv_heads, N // num_kv_heads, *rest)
    return by_kv_head.swapaxes(1, 2).reshape(-1, num_kv_heads, *rest)


def unfold_heads(folded: Shaped[Array, "T_G K *rest"], num_q_heads: int) -> Shaped[Array, "T N *rest"]:
    """What `fold_heads` was given."""
    K, *rest = folded.shape[1:]
    by_group = folded.reshape(-1, num_q_heads // K, K, *rest)
    return by_group.swapaxes(1, 2).reshape(-1, num_q_heads, *rest)


def choose_num_parts(num_items: int, num_programs: int, num_keys: int) -> int:
    """The fewest parts for which thread blocks work about as briefly as any number of parts allows.

    Args:
        num_items: query blocks of all heads.
        num_programs: thread blocks.
        num_keys: of all rows.
    """

    def rounds(num_parts: int) -> float:
        """As long as all keys take one thread block."""
        return math.ceil(num_items * num_parts / num_programs) / num_parts

    most = min(MOST_PARTS, num_keys // LEAST_PART) if num_items < num_programs else 1
    choices = range(1, max(most, 1) + 1)
    best = min(map(rounds, choices))
    return next(num_parts for num_parts in choices if rounds(num_parts) * (1 - LEAST_GAIN) <= best)


def cut_ranges(
    k_start: Int32[Array, "T"],
    k_end: Int32[Array, "T"],
    num_parts: int,
    *,
    block_q: int,
    block_kv: int,
    alignment: int,
) -> tuple[Int32[Array, "parts rows"], Int32[Array, "parts rows"]]:
    """Each row's keys [k_start, k_end) in parts.

    All rows of a block are cut at the same keys, so that together they visit no key in two parts: each row's own range
    in equal parts would leave the parts of two requests in one block almost as long as all of their keys.

    Args:
        k_start: each row's first key.
        k_end: one past each row's last key.
        num_parts: of equally many key blocks; the last ones may have fewer, or none.
        block_q: rows of a block; the last one is filled up with rows like the last.
        block_kv: keys of a key block.
        alignment: key blocks begin at multiples of it.
    """
    missing = (0, -k_start.shape[0] % block_q)
    starts, ends = (jnp.pad(x, missing, mode="edge").reshape(-1, block_q) for x in (k_start, k_end))
    has_keys = ends > starts
    end = jnp.where(has_keys, ends, 0).max(axis=1, keepdims=True)
    begin = jnp.where(has_keys, starts, end).min(axis=1, keepdims=True) // alignment * alignment
    part = -(-(end - begin) // (num_parts * block_kv)) * block_kv
    cuts = [begin + number * part for number in range(num_parts + 1)]
    starts, ends = (
        jnp.stack([jnp.clip(x, *cut).ravel() for cut in itertools.pairwise(cuts)])
        for x in (starts, jnp.maximum(starts, ends))
    )
    return starts, ends


def repeat_rows(q: Float[Array, "T N H"], num_parts: int, block_q: int) -> Float[Array, "rows N H"]:
    """All rows once for each part, which begins with a block."""
    padded = jnp.pad(q, ((0, -q.shape[0] % block_q), (0, 0), (0, 0)))
    return jnp.tile(padded, (num_parts, 1, 1))
