"""Ring attention over the striped layout (Ring Attention, arXiv:2310.01889; LoongServe, section 4.1)."""

import functools

import jax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from loongjax.pallas_kernels import prefill_attention
from loongjax.pallas_kernels.operands import (
    check_heads,
    check_indices,
    check_one_dtype,
    check_shapes,
    scale_or_default,
)
from loongjax.pallas_kernels.varying import vary_as, vary_together
from loongjax.parallel.ring_gather import attend_to_gathered
from loongjax.parallel.ring_permute import attend_in_loop, attend_step_by_step
from loongjax.parallel.ring_steps import Ring, Visit
from loongjax.parallel.striped import visible_ranges

VARIANTS = {"all_gather": attend_to_gathered, "loop": attend_in_loop, "ring": attend_step_by_step}

RING_COMPILER_OPTIONS = {"xla_gpu_collective_permute_mode": "COLLECTIVES_PEER_MEMORY"}
"""For `jax.jit(..., compiler_options=...)` of programs with rings over GPUs of one process: the permutes are then done
by copy engines, and the attention beside them keeps all multiprocessors. Without effect on CPUs; untried over several
processes.
"""

MAX_GATHERED_BLOCK_BYTES = 1 << 20
"""Keys and values of one rank, up to which GPUs gather them. On two H200s gathering won by 8 % at 256 KiB, was even at
1 MiB, and lost by a sixth at 2 MiB (benchmarks/results/ring_attention_lengths_2xH200.json); longer rings: unmeasured.
"""


def ring_attention[Carry](
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    row_starts: Int32[Array, "T"],
    *,
    axis_name: str,
    sm_scale: float | ArrayLike | None = None,
    out_dtype: DTypeLike | None = None,
    visit: Visit[Carry] | None = None,
    carry: Carry = None,
    implementation: str | None = None,
    variant: str | None = None,
) -> tuple[Float[Array, "T N H"], Float32[Array, "T N"], Carry]:
    """Causal attention of packed sequences whose tokens are striped over a mesh axis of n ranks.

    Called inside `shard_map`. With n = 1 there is no collective. Differentiable with respect to q, k and v where
    `implementation` is.

    Args:
        q: this rank's queries: local index i is token i * n + rank of the packed batch.
        k: this rank's keys.
        v: this rank's values.
        row_starts: for each row, the packed index of the first token of its request: the row sees the tokens from there
            to itself. Above its own packed index (`PADDING_ROW`): the row is padding and sees nothing.
            `stripe_row_starts` makes them.
        axis_name: the mesh axis of the ring.
        sm_scale: factor of the scores, a Python float; H ** -0.5 if None. Other scalars are made one.
        out_dtype: dtype of the output; that of the queries if None. Partial outputs are float32 in any case.
        visit: called with every block of keys, the own one included, and the rank it comes from. What it returns is the
            next call's carry. This is where keys are retained; the order is rank, rank - 1, ...
        carry: the first call's carry, a pytree of arrays. Its leaves come back varying over the axis.
        implementation: of `prefill_attention`.
        variant: how keys get to every rank. "ring": n - 1 permutes, each beside the attention to the block before, and
            up to `MAX_PARTIALS` float32 outputs in memory; "loop": the same, but the program does not grow with n;
            "all_gather": in one piece, into n blocks of memory; None: `default_variant`.

    Returns:
        The output, the natural log-sum-exp (0 and -inf in padding rows), and the last carry.

    Raises:
        ValueError: shapes that are not as above, query heads that are no multiple of the KV heads, dtypes other than
            one floating dtype of q, k and v and int32 `row_starts`, an unknown variant, or what `prefill_attention`
            raises.
        TypeError: a traced `sm_scale`, or one that is no scalar.
    """
    check_shapes("ring_attention", q=(q, "T N H"), k=(k, "T K H"), v=(v, "T K H"), row_starts=(row_starts, "T"))
    check_heads("ring_attention", q.shape[1], k.shape[1])
    check_one_dtype("ring_attention", q=q, k=k, v=v)
    check_indices("ring_attention", row_starts=row_starts)
    sm_scale = scale_or_default("ring_attention", sm_scale, q.shape[-1])
    if variant is None:
        variant = default_variant(jax.local_devices()[0].platform, k.nbytes + v.nbytes)
    if variant not in VARIANTS:
        raise ValueError(f"ring_attention: variant must be None or one of {', '.join(VARIANTS)}, got {variant!r}")
    if k.size == 0:
        variant = "ring"  # XLA's CPU client crashes when a loop outside jit sends nothing.
    num_ranks = jax.lax.axis_size(axis_name)
    q, k, v, row_starts, rank = vary_together(q, k, v, row_starts, jax.lax.axis_index(axis_name))
    carry = vary_as(carry, carry, rank)
    out_dtype = q.dtype if out_dtype is None else out_dtype
    attend = functools.partial(prefill_attention, sm_scale=sm_scale, implementation=implementation)
    visit = _leave if visit is None else visit
    if num_ranks == 1:
        o, lse = attend(q, k, v, *visible_ranges(row_starts, rank, rank, 1), out_dtype=out_dtype)
        return o, lse, visit(rank, k, v, carry)
    ring = Ring(
        axis_name=axis_name,
        num_ranks=num_ranks,
        rank=rank,
        q=q,
        row_starts=row_starts,
        attend=attend,
        visit=visit,
    )
    (o, lse), carry = VARIANTS[variant](ring, k, v, carry, out_dtype)
    return o, lse, carry


def _leave[Carry](source_rank: jax.Array, k: jax.Array, v: jax.Array, carry: Carry) -> Carry:
    return carry


def default_variant(platform: str, block_bytes: int) -> str:
    """The fastest variant on GPUs; elsewhere the one that compiles fastest.

    Args:
        platform: of the devices, such as "gpu".
        block_bytes: of one rank's keys and values.
    """
    if platform != "gpu":
        return "loop"
    return "all_gather" if block_bytes <= MAX_GATHERED_BLOCK_BYTES else "ring"
