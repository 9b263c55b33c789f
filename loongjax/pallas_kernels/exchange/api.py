"""The public ops, called inside `shard_map`.

Each takes `peers`, the table that `PeerMemory` makes of a mesh, replicated over it, or None. With it, messages that are
small enough go through kernels of our own, which CUDA graphs can hold; XLA's collectives serve everything else, and all
messages where the kernels' packages are not installed.

All ranks of an axis must make the same exchanges in the same order. Those of one program must follow from each other,
each taking in something that the one before gave out, or XLA could run them in any order.
"""

from typing import TypeGuard

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32, Shaped, UInt32

from loongjax.pallas_kernels.exchange.group import group_of, vary_over, varying_axes
from loongjax.pallas_kernels.exchange.reference import (
    reference_all_gather,
    reference_all_reduce,
    reference_exchange_and_merge,
    xla_all_reduce,
)
from loongjax.pallas_kernels.triton_gpu import is_triton_installed, require_triton
from loongjax.pallas_kernels.variants import pick_variant

type Peers = UInt32[Array, "*mesh 3"] | None

MAX_SENT_BYTES = 4 * 1024 * 1024
"""Of what one rank sends to all others together, partial outputs counted in float32. Our kernels send everything to
everybody at once, which takes the least time for small messages; XLA's ring sends less of large ones. On two H200s ours
take about half of XLA's time up to 2 MiB, 72 % at 4 and 87 % at 8; the more ranks there are, the sooner the ring wins.
"""

REDUCED_DTYPES = ("bfloat16", "float16", "float32")
GATHERED_DTYPES = (*REDUCED_DTYPES, "bool", "int8", "int16", "int32", "uint8", "uint16", "uint32")
"""Others can travel as an integer of their size (`jax.lax.bitcast_convert_type`)."""
MAX_HEAD_DIM = 4096
"""Of a row that is merged: it has to fit a message."""


def all_reduce(
    x: Float[Array, "*shape"], axis_name: str, peers: Peers = None, *, implementation: str | None = None
) -> Float[Array, "*shape"]:
    """The sum of all ranks' arrays, on every rank.

    Args:
        x: this rank's array.
        axis_name: the mesh axis.
        peers: of the mesh.
        implementation: "reference" (float32, by XLA), "xla" (in x's dtype, by XLA), "triton" (float32, in rank order,
            rounded once: the same to the last bit on every rank; float32, bfloat16 and float16), or None for "triton"
            where there are peers and a rank sends at most `MAX_SENT_BYTES`, "xla" elsewhere.

    Raises:
        ValueError: an unknown implementation, "triton" without peers or of another dtype, or peers of another mesh.
        ConfigError: "triton" without the packages that it needs.
    """
    is_small = _is_small(x.nbytes, axis_name) and x.dtype.name in REDUCED_DTYPES
    name = "triton" if is_small and _has_kernels(peers) else "xla"
    variant = pick_variant("all_reduce", implementation, ALL_REDUCE, default=name)
    return variant(x, axis_name, peers)


def all_gather(
    x: Shaped[Array, "*shape"], axis_name: str, peers: Peers = None, *, implementation: str | None = None
) -> Shaped[Array, "n *shape"]:
    """All ranks' arrays, on every rank.

    By "triton" one NaN, the one whose bits are all ones, arrives as another NaN.

    Args:
        x: this rank's array.
        axis_name: the mesh axis.
        peers: of the mesh.
        implementation: "reference" (by XLA), "triton" (`GATHERED_DTYPES`), or None for "triton" where there are peers
            and a rank sends at most `MAX_SENT_BYTES`, "reference" elsewhere.

    Raises:
        ValueError: an unknown implementation, "triton" without peers or of another dtype, or peers of another mesh.
        ConfigError: "triton" without the packages that it needs.
    """
    is_small = _is_small(x.nbytes, axis_name) and x.dtype.name in GATHERED_DTYPES
    name = "triton" if is_small and _has_kernels(peers) else "reference"
    variant = pick_variant("all_gather", implementation, ALL_GATHER, default=name)
    return variant(x, axis_name, peers)


def exchange_and_merge(
    o: Float32[Array, "n B N H"],
    lse: Float32[Array, "n B N"],
    axis_name: str,
    peers: Peers = None,
    *,
    out_dtype: DTypeLike = jnp.float32,
    implementation: str | None = None,
) -> tuple[Float[Array, "B N H"], Float32[Array, "B N"]]:
    """Partial attentions back to the masters of their rows, and there into one, as `merge_partials` does it.

    Args:
        o: this rank's partial outputs of the B rows that each rank masters; anything where `lse` is -inf.
        lse: their natural log-sum-exps; -inf where this rank has no keys of a row.
        axis_name: the mesh axis, of n ranks.
        peers: of the mesh.
        out_dtype: of the merged output. If it has 16 bits, "triton" sends partial outputs as float16 in units of the
            largest element of their row, so each is off by up to 2^-12 of that, however small it is itself; an element
            beyond 65504 in a row with an infinite one becomes infinite too.
        implementation: "reference" (by XLA), "triton", or None for "triton" where there are peers and a rank sends at
            most `MAX_SENT_BYTES`, "reference" elsewhere.

    Returns:
        Output and natural log-sum-exp of this rank's rows; 0 and -inf in rows without keys on any rank.

    Raises:
        ValueError: an unknown implementation, "triton" without peers or for a head dim above 4096, or peers of another
            mesh.
        ConfigError: "triton" without the packages that it needs.
    """
    is_small = _is_small(o.nbytes // o.shape[0], axis_name) and o.shape[-1] <= MAX_HEAD_DIM
    name = "triton" if is_small and _has_kernels(peers) else "reference"
    variant = pick_variant("exchange_and_merge", implementation, EXCHANGE_AND_MERGE, default=name)
    return variant(o, lse, axis_name, peers, jnp.dtype(out_dtype))


def _is_small(num_bytes: int, axis_name: str) -> bool:
    """Whether so much can be sent to each other rank by kernels of our own."""
    return num_bytes * (jax.lax.axis_size(axis_name) - 1) <= MAX_SENT_BYTES


def exchange_status(after: Shaped[Array, "*shape"], peers: Peers = None) -> Int32[Array, "1"]:
    """This device's status once `after` is there: 0 if all exchanges so far went well.

    `PeerMemory.check` tells what another number means. A program returns it beside its results, from the last of its
    exchanges, so that a failure shows without another call.

    Args:
        after: the result of the last exchange, or something that follows from it.
        peers: of the mesh; always 0 without.
    """
    if not _has_kernels(peers):
        return vary_over(jnp.zeros(1, jnp.int32), varying_axes(after))
    from loongjax.pallas_kernels.exchange.launch import triton_status

    group = group_of(peers, jax.sharding.get_abstract_mesh().axis_names[0])
    return vary_over(triton_status(after, group), varying_axes(group))


def _triton_all_reduce(x: jax.Array, axis_name: str, peers: jax.Array | None) -> jax.Array:
    if _is_trivial(x, axis_name):
        return xla_all_reduce(x, axis_name)
    if x.dtype.name not in REDUCED_DTYPES:
        raise ValueError(f"all_reduce: implementation 'triton' takes {', '.join(REDUCED_DTYPES)}, got {x.dtype.name}")
    group = _group("all_reduce", axis_name, peers)
    from loongjax.pallas_kernels.exchange.launch import ExchangeTuning, triton_all_reduce

    # Every rank has the same, so it doesn't vary over the axis.
    return vary_over(triton_all_reduce(x, group, tuning=ExchangeTuning()), varying_axes(x) - {axis_name})


def _triton_all_gather(x: jax.Array, axis_name: str, peers: jax.Array | None) -> jax.Array:
    if _is_trivial(x, axis_name):
        return reference_all_gather(x, axis_name)
    if x.dtype.name not in GATHERED_DTYPES:
        raise ValueError(f"all_gather: implementation 'triton' takes {', '.join(GATHERED_DTYPES)}, got {x.dtype.name}")
    group = _group("all_gather", axis_name, peers)
    from loongjax.pallas_kernels.exchange.launch import ExchangeTuning, triton_all_gather

    return vary_over(triton_all_gather(x, group, tuning=ExchangeTuning()), varying_axes(x) | {axis_name})


def _triton_exchange_and_merge(
    o: jax.Array, lse: jax.Array, axis_name: str, peers: jax.Array | None, out_dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    if _is_trivial(o, axis_name):
        return reference_exchange_and_merge(o, lse, axis_name, out_dtype)
    if o.shape[-1] > MAX_HEAD_DIM:
        raise ValueError(
            f"exchange_and_merge: implementation 'triton' takes head dims up to {MAX_HEAD_DIM}, got {o.shape[-1]}"
        )
    group = _group("exchange_and_merge", axis_name, peers)
    from loongjax.pallas_kernels.exchange.launch import ExchangeTuning, triton_exchange_and_merge

    merged = triton_exchange_and_merge(o, lse, group, out_dtype=out_dtype, tuning=ExchangeTuning())
    axes = varying_axes(o) | varying_axes(lse) | {axis_name}
    return vary_over(merged[0], axes), vary_over(merged[1], axes)


def _has_kernels(peers: jax.Array | None) -> TypeGuard[jax.Array]:
    return peers is not None and is_triton_installed()


def _is_trivial(x: jax.Array, axis_name: str) -> bool:
    """Whether there is nothing to send, or nobody to send it to."""
    return x.size == 0 or jax.lax.axis_size(axis_name) == 1


def _group(op: str, axis_name: str, peers: jax.Array | None) -> jax.Array:
    """Imports of kernels follow it: their packages come with the `gpu` extra."""
    if peers is None:
        raise ValueError(f"{op}: implementation 'triton' needs peers")
    require_triton(op)
    return group_of(peers, axis_name)


ALL_REDUCE = {
    "reference": lambda x, axis_name, _: reference_all_reduce(x, axis_name),
    "triton": _triton_all_reduce,
    "xla": lambda x, axis_name, _: xla_all_reduce(x, axis_name),
}
ALL_GATHER = {
    "reference": lambda x, axis_name, _: reference_all_gather(x, axis_name),
    "triton": _triton_all_gather,
}
EXCHANGE_AND_MERGE = {
    "reference": lambda o, lse, axis_name, _, out_dtype: reference_exchange_and_merge(o, lse, axis_name, out_dtype),
    "triton": _triton_exchange_and_merge,
}
