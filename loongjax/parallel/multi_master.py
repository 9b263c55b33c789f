"""Multi-master distributed decode (LoongServe, section 4.2): queries travel, keys stay."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Float32, Int32, UInt32

from loongjax.pallas_kernels import decode_attention
from loongjax.pallas_kernels.exchange import all_gather, exchange_and_merge
from loongjax.pallas_kernels.operands import check_shapes, scale_or_default


def multi_master_decode(
    q: Float[Array, "B_m N H"],
    kv_pool: Float[Array, "L 2 P page_size K H"],
    layer: Int32[Array, ""],
    page_indices: Int32[Array, "I"],
    page_starts: Int32[Array, "n_B_m"],
    kv_lens: Int32[Array, "n_B_m"],
    *,
    axis_name: str,
    sm_scale: float | ArrayLike | None = None,
    out_dtype: DTypeLike | None = None,
    implementation: str | None = None,
    peers: UInt32[Array, "*mesh 3"] | None = None,
) -> tuple[Float[Array, "B_m N H"], Float32[Array, "B_m N"]]:
    """Attention of each master's requests over their keys on all n instances of a mesh axis.

    Called inside `shard_map`. Every rank's queries go to every rank (`all_gather`), each attends to the keys that it
    holds itself, and outputs and log-sum-exps go back in float32 to the rows' masters, who merge them
    (`exchange_and_merge`). With n = 1 there is no collective.

    Args:
        q: this rank's rows. A rank that masters fewer than B_m, or none, pads with rows that have no keys anywhere.
        kv_pool: this rank's pool, as in `decode_attention`.
        layer: which layer.
        page_indices: this rank's tables.
        page_starts: for every row of every rank, ordered by (master's rank, row), where its table begins on this rank.
        kv_lens: for every row in the same order, how many keys this rank holds of it; 0 for none.
        axis_name: the mesh axis.
        sm_scale: factor of the scores, a Python float; H ** -0.5 if None. Other scalars are made one.
        out_dtype: dtype of the output; that of the queries if None.
        implementation: of `decode_attention`.
        peers: `PeerMemory.table` of the mesh, replicated, for exchanges by kernels of our own where messages are small;
            by XLA's collectives if None.

    Returns:
        Output and natural log-sum-exp of this rank's rows; 0 and -inf in rows without keys anywhere.

    Raises:
        ValueError: tables of another number of rows than n * B_m, peers of another mesh, or what `decode_attention`
            raises.
        TypeError: a traced `sm_scale`, or one that is no scalar.
    """
    num_ranks = jax.lax.axis_size(axis_name)
    check_shapes("multi_master_decode", q=(q, "B_m N H"))
    sm_scale = scale_or_default("multi_master_decode", sm_scale, q.shape[-1])
    B_m, N, H = q.shape
    out_dtype = q.dtype if out_dtype is None else out_dtype
    for name, table in (("page_starts", page_starts), ("kv_lens", kv_lens)):
        if table.shape != (num_ranks * B_m,):
            raise ValueError(
                f"multi_master_decode: {num_ranks} ranks of {B_m} rows need {num_ranks * B_m} {name}, "
                f"got the shape {list(table.shape)}"
            )

    def attend(q: Float[Array, "B N H"], out_dtype: DTypeLike) -> tuple[Float[Array, "B N H"], Float32[Array, "B N"]]:
        return decode_attention(
            q,
            kv_pool,
            layer,
            page_indices,
            page_starts,
            kv_lens,
            sm_scale=sm_scale,
            out_dtype=out_dtype,
            implementation=implementation,
        )

    if num_ranks == 1:
        return attend(q, out_dtype)
    all_q = all_gather(q, axis_name, peers).reshape(num_ranks * B_m, N, H)
    o, lse = attend(all_q, jnp.float32)
    partial_o, partial_lse = o.reshape(num_ranks, B_m, N, H), lse.reshape(num_ranks, B_m, N)
    return exchange_and_merge(partial_o, partial_lse, axis_name, peers, out_dtype=out_dtype)
