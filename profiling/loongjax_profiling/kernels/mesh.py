"""Cases of ops over several devices: the small exchanges of decode, and ring attention."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Float32

from loongjax.errors import EngineError
from loongjax.pallas_kernels.exchange import PeerMemory, all_gather, all_reduce, exchange_and_merge
from loongjax.pallas_kernels.triton_gpu import is_triton_usable
from loongjax.parallel import RING_COMPILER_OPTIONS, ring_attention
from loongjax_profiling.kernels.case import Case, Repeat, Row
from loongjax_profiling.kernels.chain import repeat_step
from loongjax_profiling.kernels.dense import causal, num_pairs
from loongjax_profiling.kernels.paged import HEAD_DIM

AXIS = "ranks"
SIZES = (2, 4, 8)
"""Devices of a mesh, as far as there are so many."""
HIDDEN_SIZE, NUM_HEADS = 4096, 32
REDUCED_TOKENS = (1, 32, 128, 512, 1024)
MASTER_REQUESTS = (1, 32, 256)
"""As few as a decode step has, and as many as XLA takes over for, by default."""
TARGET_TOKENS, TARGET_SIZE = 32, 4
"""What the targets of exchanges are for: so many tokens or requests, on so many devices at most."""
REDUCE_S, EXCHANGE_S = 10e-6, 15e-6
RING_LENGTH = 131072
RING_HEADS = ((32, 8), (32, 32))
RING_SHARE = 0.95
"""Of the rate of one device that has the whole prompt."""

Step = Callable[[jax.Array | None, jax.Array, jax.Array], jax.Array]
"""Of one rank: (peers, x, factor) to what the next one takes as x."""


def mesh_sizes(num_devices: int) -> list[int]:
    """The meshes to measure where there are so many devices; none of one."""
    return [size for size in SIZES if size <= num_devices]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exchange:
    """One that a decode makes, and XLA's way to make it."""

    op: str
    work: str
    shape: tuple[int, ...]
    """Of one rank's operand, in bfloat16."""
    num_bytes: float
    """That one rank sends to all others together."""
    most_seconds: float | None
    """The target, with the multiplications that stand between two exchanges for what a model does there."""
    step: Callable[[str], Step]
    """By implementation."""
    without_kernels: str
    """The implementation where there are no kernels of our own."""
    rival: str
    rival_step: Step
    rival_implementation: str | None = None
    """What the op calls the rival, if it is one of its own."""
    factor: float = 1.0
    """By which each step multiplies, in the mean."""


def exchanges_of(size: int) -> Iterator[Exchange]:
    """On a mesh of so many devices."""
    is_target = size <= TARGET_SIZE
    for num_tokens in REDUCED_TOKENS:
        yield Exchange(
            op="all_reduce",
            work=f"{num_tokens} x {HIDDEN_SIZE}, {size} devices",
            shape=(num_tokens, HIDDEN_SIZE),
            num_bytes=2.0 * (size - 1) * num_tokens * HIDDEN_SIZE,
            most_seconds=REDUCE_S if is_target and num_tokens == TARGET_TOKENS else None,
            step=lambda implementation: functools.partial(_reduce, implementation),
            without_kernels="xla",
            rival="psum",
            rival_step=functools.partial(_reduce, "xla"),
            rival_implementation="xla",
            factor=1.0 / size,
        )
    for num_requests in MASTER_REQUESTS:
        yield Exchange(
            op="multi_master",
            work=f"{num_requests} a master, {NUM_HEADS} heads, {size} devices",
            shape=(num_requests, NUM_HEADS, HEAD_DIM),
            # Queries, and outputs, their units and log-sum-exps back.
            num_bytes=float(size - 1) * num_requests * NUM_HEADS * (2 * HEAD_DIM + 2 * HEAD_DIM + 8),
            most_seconds=EXCHANGE_S if is_target and num_requests == TARGET_TOKENS else None,
            step=lambda implementation: functools.partial(_gather_and_merge, implementation),
            without_kernels="reference",
            rival="reduce-scatter",
            rival_step=lambda peers, q, factor: by_reduce_scatter(q, factor, axis_name=AXIS),
        )


def exchange_cases(implementation: str | None, num_devices: int, *, has_targets: bool) -> Iterator[Case]:
    """Those of every mesh, beside XLA's collectives; by kernels of our own where they run, unless told otherwise."""
    for size in mesh_sizes(num_devices):
        for exchange in exchanges_of(size):
            chosen = implementation or ("triton" if is_triton_usable() else exchange.without_kernels)
            ours = Case(
                op=exchange.op,
                work=exchange.work,
                variant=chosen,
                amount=exchange.num_bytes,
                unit="B",
                num_devices=size,
                build=functools.partial(repeat_exchange, exchange, exchange.step(chosen), size, chosen == "triton"),
                most_seconds=exchange.most_seconds if has_targets else None,
            )
            yield ours
            if chosen != exchange.rival_implementation:
                build = functools.partial(repeat_exchange, exchange, exchange.rival_step, size, False)
                yield dataclasses.replace(ours, variant=exchange.rival, is_rival=True, most_seconds=None, build=build)


def ring_cases(implementation: str, num_devices: int, shrink: int) -> Iterator[Case]:
    """A causal prompt on one device, and striped over every mesh; rates are those of one device."""
    for heads in RING_HEADS:
        name = f"{RING_LENGTH // 1024}K causal, {heads[0]}/{heads[1]}"
        alone = f"{name}, 1 device"
        for size in [1, *mesh_sizes(num_devices)]:
            length = max(1, RING_LENGTH // shrink // size) * size
            is_ring = size > 1
            yield Case(
                op="ring_attention",
                work=f"{name}, {size} devices" if is_ring else alone,
                variant=implementation,
                amount=4.0 * num_pairs(causal([length])) * heads[0] * HEAD_DIM / size,
                unit="FLOP",
                num_devices=size,
                build=functools.partial(_ring, implementation, length, heads, size),
                baseline=(alone, implementation) if is_ring else None,
                least_share=RING_SHARE if is_ring and shrink == 1 else None,
            )


def checked(row: Row) -> Row:
    """The row of an exchange, or of one that failed if a device has given up waiting for another: then no time holds,
    and none that follows.
    """
    if not row.case.is_exchange or not peer_memory.cache_info().currsize:
        return row
    try:
        peer_memory().check()
    except EngineError as error:
        return Row(case=row.case, error=str(error))
    return row


@functools.cache
def peer_memory() -> PeerMemory:
    """Of all devices. It has to live as long as programs run that exchange through it.

    Raises:
        ConfigError: they cannot reach each other's memory.
    """
    return PeerMemory(jax.devices())


def attend_stand_in(
    all_q: Float[Array, "n B N H"], factor: jax.Array
) -> tuple[Float32[Array, "n B N H"], Float32[Array, "n B N"]]:
    """In place of attention: partial outputs and log-sum-exps of every master's rows."""
    o = (all_q * factor).astype(jnp.float32)
    return o, o[..., 0]


def by_reduce_scatter(q: Float[Array, "B N H"], factor: jax.Array, *, axis_name: str) -> Float[Array, "B N H"]:
    """The least that XLA's collectives need; right only where exp(lse) does not overflow."""
    o, lse = attend_stand_in(jax.lax.all_gather(q, axis_name), factor)
    weight = jnp.exp(lse)[..., None]
    total = jax.lax.psum_scatter(jnp.concatenate([o * weight, weight], axis=-1), axis_name)
    return (total[..., :-1] / total[..., -1:]).astype(q.dtype)


def on_every_rank(step: Step, mesh: Mesh) -> Step:
    """The same for the whole mesh: x and factor have one entry a rank."""

    def body(peers: jax.Array | None, x: jax.Array, factor: jax.Array) -> jax.Array:
        return step(peers, x[0], factor[0])[None]

    return jax.shard_map(body, mesh=mesh, in_specs=(P(), P(AXIS), P(AXIS)), out_specs=P(AXIS), check_vma=False)


def repeat_exchange(exchange: Exchange, step: Step, size: int, has_peers: bool) -> Repeat:
    """Exchanges of so many devices, each of what the one before gave; with the table of peers or without."""
    mesh = _mesh(size)
    mapped = on_every_rank(step, mesh)
    peers = peer_memory().table(mesh) if has_peers else None
    factors = np.random.default_rng(0).uniform(0.8, 1.2, size) * exchange.factor
    by_rank = NamedSharding(mesh, P(AXIS))
    x = jax.device_put(_random(0, size, *exchange.shape), by_rank)
    operands = peers, jax.device_put(jnp.asarray(factors, x.dtype), by_rank)
    return repeat_step(lambda operands, x, i: mapped(operands[0], x, operands[1]), operands, x)


def _reduce(implementation: str, peers: jax.Array | None, x: jax.Array, factor: jax.Array) -> jax.Array:
    return all_reduce(x * factor, AXIS, peers, implementation=implementation)


def _gather_and_merge(implementation: str, peers: jax.Array | None, q: jax.Array, factor: jax.Array) -> jax.Array:
    o, lse = attend_stand_in(all_gather(q, AXIS, peers, implementation=implementation), factor)
    merged, _ = exchange_and_merge(o, lse, AXIS, peers, out_dtype=q.dtype, implementation=implementation)
    return merged


def _ring(implementation: str, length: int, heads: tuple[int, int], size: int) -> Repeat:
    mesh = _mesh(size)
    by_rank = NamedSharding(mesh, P(AXIS))
    shapes = [(size, length // size, num_heads, HEAD_DIM) for num_heads in (heads[0], heads[1], heads[1])]
    qkv = tuple(jax.device_put(_random(seed, *shape), by_rank) for seed, shape in enumerate(shapes))
    row_starts = jnp.zeros(shapes[0][:2], jnp.int32, device=by_rank)

    def body(row_starts: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, o: jax.Array) -> tuple[jax.Array, ...]:
        # Queries, keys and values wait for the repetition before, or XLA would attend once for all; no bit changes.
        q, k, v = (x.at[0, 0, 0, 0].add(o[0, 0, 0, 0] * jnp.asarray(1e-30, o.dtype)) for x in (q, k, v))
        # All of the output is carried: partial outputs of rows that nobody sees would not be merged.
        operands = q[0], k[0], v[0], row_starts[0]
        o, _, _ = ring_attention(*operands, axis_name=AXIS, variant="ring", implementation=implementation)
        return q, k, v, o[None]

    mapped = jax.shard_map(body, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS), check_vma=False)
    return repeat_step(
        lambda row_starts, carried, i: mapped(row_starts, *carried),
        row_starts,
        (*qkv, jnp.zeros_like(qkv[0])),
        as_loop=True,
        compiler_options=RING_COMPILER_OPTIONS,
    )


def _mesh(size: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:size]), (AXIS,))


def _random(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)
