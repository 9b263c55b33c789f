"""Decode over a long context that is spread over devices, merged by log-sum-exp in a tree of pairwise merges.

The keys of one context lie in uneven parts on 1, 2, 3, 5 and 8 devices in turn, with none on one of them. Queries go
to all devices, each attends to the keys that it holds, and the partial outputs meet in pairs: after ceil(log2 n) rounds
the first device has the attention over all keys. `multi_master_decode` gives the same with one all-to-all instead of
the tree, and every device ends up with the rows that it sent. Dense attention is the truth for both.

    python examples/tree_merged_decode.py
    python examples/tree_merged_decode.py --context-len 100000 --rows 4 --sizes 6

Runs on GPUs, or on eight virtual CPU devices where there are none. Mesh, axis name and `shard_map` are this script's.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from loongjax.pallas_kernels import decode_attention, merge_attention
from loongjax.parallel import multi_master_decode

N, K, H = 8, 2, 64
"""Query heads, KV heads, head dim. In shapes, S is the context's tokens, B the rows of one device, n the devices."""
PAGE_SIZE = 16
AXIS = "leaves"
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
"""The largest difference from dense attention that rounding may cause."""


def main() -> None:
    args = parse_args()
    start_jax()
    dtype = args.dtype or ("bfloat16" if jax.default_backend() == "gpu" else "float32")
    sizes = args.sizes or [size for size in (1, 2, 3, 5, 8) if size <= len(jax.devices())]
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((2, args.context_len, K, H), np.float32).astype(jnp.dtype(dtype))
    print(f"{args.context_len} keys, {args.rows} rows a device, {dtype}, {jax.devices()[0].device_kind}")
    print("                           seconds of 2nd call   largest difference of the tree from")
    print("devices  rounds  most keys    tree  multi-master      dense  multi-master")
    differences = []
    for size in sizes:
        # Long queries: each attends to few keys, so that a key too few or too many is seen.
        q = 3 * rng.standard_normal((size, args.rows, N, H), np.float32).astype(k.dtype)
        part_lens = uneven_parts(rng, args.context_len, size)
        mesh = mesh_of(size)
        arrays = q, *paged_pools(k, v, part_lens)
        by_tree, tree_s = second_call(tree_merged, mesh, *arrays)
        by_masters, masters_s = second_call(multi_master, mesh, *arrays)
        dense = dense_attention(q.reshape(-1, N, H), k, v)
        tree, masters = by_tree[0], by_masters.reshape(dense.shape)
        differences += [np.abs(tree - dense).max(), np.abs(tree - masters).max()]
        columns = size, num_rounds(size), max(part_lens), tree_s, masters_s, *differences[-2:]
        print("{:7}  {:6}  {:9}  {:6.4f}  {:12.4f}  {:9.1e}  {:12.1e}".format(*columns))
    if not np.max(differences) <= TOLERANCE[dtype]:
        sys.exit(f"A difference of {np.max(differences):.1e}, which is more than {TOLERANCE[dtype]}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context-len", type=count, default=20_000, help="tokens")
    parser.add_argument("--rows", type=count, default=2, help="queries that each device sends to all")
    parser.add_argument("--sizes", type=int, nargs="+", help="of the meshes; 1 2 3 5 8, as far as devices are here")
    parser.add_argument("--dtype", choices=sorted(TOLERANCE), help="bfloat16 on a GPU, float32 elsewhere")
    return parser.parse_args()


def count(text: str) -> int:
    """An argument that counts something there must be."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def start_jax() -> None:
    """Makes a CPU eight devices. Must come before anything that asks for a device."""
    # XLA's CPU client sizes its thread pool by this, and collectives can deadlock in a small one.
    os.environ.setdefault("NPROC", "32")
    # NVLink multicast can take GPUs that others share out of service.
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    if "JAX_NUM_CPU_DEVICES" not in os.environ:
        jax.config.update("jax_num_cpu_devices", 8)


def mesh_of(num_devices: int) -> Mesh:
    devices = jax.devices()
    if not 0 < num_devices <= len(devices):
        sys.exit(f"A mesh of {num_devices} devices, where {len(devices)} are")
    return Mesh(np.array(devices[:num_devices]), (AXIS,))


def merge_in_a_tree(o: jax.Array, lse: jax.Array, axis_name: str) -> tuple[jax.Array, jax.Array]:
    """The merge of all ranks' partial outputs [R, N, H] and log-sum-exps [R, N], on rank 0; parts of it elsewhere.

    In the round of stride s, of 1, 2, 4, ..., the ranks that are odd multiples of s send all that they have merged to
    the rank s below them. n ranks need ceil(log2 n) rounds, and any n will do: who has no partner waits.
    """
    n = jax.lax.axis_size(axis_name)
    rank = jax.lax.axis_index(axis_name)
    for stride in (2**i for i in range(num_rounds(n))):
        pairs = [(sender, sender - stride) for sender in range(stride, n, 2 * stride)]
        other_o, other_lse = jax.lax.ppermute((o, lse), axis_name, pairs)
        # Who is sent nothing finds zeros here, and a log-sum-exp of 0 would count.
        receives = (rank % (2 * stride) == 0) & (rank + stride < n)
        o, lse = merge_attention(o, lse, other_o, jnp.where(receives, other_lse, -jnp.inf))
    return o, lse


def num_rounds(num_ranks: int) -> int:
    """ceil(log2 num_ranks)"""
    return (num_ranks - 1).bit_length()


@jax.jit
def tree_merged(q, pool, page_indices, kv_len):
    """Outputs of all rows on each device [n, n * B, N, H], of which the first device's are over all keys."""

    def on_each_device(*shards):
        q, pool, page_indices, kv_len = (x[0] for x in shards)
        q = jax.lax.all_gather(q, AXIS, tiled=True)
        # All rows read the same table, from its beginning.
        page_starts, kv_lens = jnp.zeros(len(q), jnp.int32), jnp.broadcast_to(kv_len, len(q))
        o, lse = decode_attention(q, pool, jnp.int32(0), page_indices, page_starts, kv_lens, out_dtype=jnp.float32)
        o, _ = merge_in_a_tree(o, lse, AXIS)
        return o[None]

    return jax.shard_map(on_each_device, in_specs=P(AXIS), out_specs=P(AXIS))(q, pool, page_indices, kv_len)


@jax.jit
def multi_master(q, pool, page_indices, kv_len):
    """Outputs over all keys [n, B, N, H], on each device those of its own rows."""

    def on_each_device(*shards):
        q, pool, page_indices, kv_len = (x[0] for x in shards)
        num_rows = len(q) * jax.lax.axis_size(AXIS)
        page_starts, kv_lens = jnp.zeros(num_rows, jnp.int32), jnp.broadcast_to(kv_len, num_rows)
        o, _ = multi_master_decode(
            q, pool, jnp.int32(0), page_indices, page_starts, kv_lens, axis_name=AXIS, out_dtype=jnp.float32
        )
        return o[None]

    return jax.shard_map(on_each_device, in_specs=P(AXIS), out_specs=P(AXIS))(q, pool, page_indices, kv_len)


def second_call(program: Callable[..., jax.Array], mesh: Mesh, *arrays: np.ndarray) -> tuple[np.ndarray, float]:
    """The program's output on this mesh, and the seconds it takes once it is compiled."""
    # The programs know only the axis: they run on whatever mesh is set.
    on_devices = jax.device_put(arrays, NamedSharding(mesh, P(AXIS)))
    with jax.set_mesh(mesh):
        program(*on_devices).block_until_ready()
        started_s = time.perf_counter()
        output = program(*on_devices).block_until_ready()
        return np.asarray(output), time.perf_counter() - started_s


def uneven_parts(rng: np.random.Generator, context_len: int, num_devices: int) -> list[int]:
    """How many of the keys each device holds: any number, and none on one device of several."""
    shares = rng.random(num_devices)
    if num_devices > 1:
        shares[rng.integers(num_devices)] = 0
    return rng.multinomial(context_len, shares / shares.sum()).tolist()


def paged_pools(k: np.ndarray, v: np.ndarray, part_lens: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each device's pool [n, 1, 2, P, page_size, K, H], table of pages [n, P] and number of keys [n].

    Pages are in any order; what no key fills is NaN, to show that nothing reads it.
    """
    n, num_pages = len(part_lens), max(1, -(-max(part_lens) // PAGE_SIZE))
    rng = np.random.default_rng(num_pages)
    page_indices = np.stack([rng.permutation(num_pages) for _ in part_lens]).astype(np.int32)
    pools = np.full((n, 1, 2, num_pages, PAGE_SIZE, K, H), np.nan, k.dtype)
    cuts = np.cumsum(part_lens)[:-1]
    for pool, table, *parts in zip(pools, page_indices, np.split(k, cuts), np.split(v, cuts), strict=True):
        for i, part in enumerate(parts):
            in_order = np.full((num_pages * PAGE_SIZE, K, H), np.nan, k.dtype)
            in_order[: len(part)] = part
            pool[0, i, table] = in_order.reshape(num_pages, PAGE_SIZE, K, H)
    return pools, page_indices, np.asarray(part_lens, np.int32)


def dense_attention(q_BNH: np.ndarray, k_SKH: np.ndarray, v_SKH: np.ndarray) -> np.ndarray:
    """Every row over all keys, in float64, since float32 sums over so many keys are no truth for others: [B, N, H]."""
    q_KGBH = np.moveaxis(q_BNH.astype(np.float64).reshape(-1, K, N // K, H), 0, 2)
    k_K1SH, v_K1SH = (x.astype(np.float64).swapaxes(0, 1)[:, None] for x in (k_SKH, v_SKH))
    scores_KGBS = q_KGBH @ k_K1SH.swapaxes(2, 3) * H**-0.5
    weights_KGBS = np.exp(scores_KGBS - scores_KGBS.max(axis=-1, keepdims=True))
    o_KGBH = weights_KGBS @ v_K1SH / weights_KGBS.sum(axis=-1, keepdims=True)
    return np.moveaxis(o_KGBH, 2, 0).reshape(q_BNH.shape)


if __name__ == "__main__":
    main()
