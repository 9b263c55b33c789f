"""Ring attention on a mesh that changes size between calls, and keys that stay where they will be needed.

A packed batch of prompts is striped over 1, 2, 3, 5 and 8 devices in turn, and every size gives what dense attention
gives. While the keys go round the ring, devices of your choice each keep an interval of them: here half of the devices,
intervals of different lengths. The others are free as soon as the ring has turned, no key is moved afterwards, and the
tokens that follow the prompts attend over what was kept as if it were in one place.

    python examples/ring_on_changing_mesh.py
    python examples/ring_on_changing_mesh.py --prompt-lens 6000 2000 1 500 --sizes 2 4

Runs on GPUs, or on eight virtual CPU devices where there are none. Mesh, axis name and `shard_map` are this script's.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from loongjax.parallel import multi_master_decode, retain, ring_attention, stripe, stripe_row_starts, unstripe

N, K, H = 8, 2, 64
"""Query heads, KV heads, head dim. In shapes, T is the tokens of all prompts, B the prompts, n the devices."""
AXIS = "ring"
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
"""The largest difference from dense attention that rounding may cause."""


def main() -> None:
    args = parse_args()
    start_jax()
    dtype = args.dtype or ("bfloat16" if jax.default_backend() == "gpu" else "float32")
    sizes = args.sizes or [size for size in (1, 2, 3, 5, 8) if size <= len(jax.devices())]
    batch = random_batch(args.prompt_lens, dtype)
    dense_prompts, dense_next_tokens = dense_outputs(batch)
    print(f"{len(batch.q)} tokens of {len(args.prompt_lens)} prompts, {dtype}, {jax.devices()[0].device_kind}")
    print("         devices that  seconds of 2nd call   largest difference")
    print("devices     keep keys    prefill    decode   prompts  next tokens")
    differences = []
    for size in sizes:
        intervals = choose_intervals(len(batch.q), size)
        prompts, next_tokens, *seconds = run(batch, mesh_of(size), intervals)
        differences += [np.abs(prompts - dense_prompts).max(), np.abs(next_tokens - dense_next_tokens).max()]
        num_keepers = sum(start < end for start, end in intervals)
        columns = size, num_keepers, *seconds, *differences[-2:]
        print("{:7}  {:12}  {:9.4f} {:9.4f}  {:8.1e}  {:11.1e}".format(*columns))
    if not np.max(differences) <= TOLERANCE[dtype]:
        sys.exit(f"{np.max(differences):.1e} from dense attention, which is more than {TOLERANCE[dtype]}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt-lens", type=count, nargs="+", default=[2000, 1, 300, 1000], help="tokens of each")
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Prompts packed one after another, and the query of the token that follows each."""

    prompt_lens: Sequence[int]
    q: np.ndarray
    """[T, N, H]"""
    k: np.ndarray
    """[T, K, H]"""
    v: np.ndarray
    """[T, K, H]"""
    next_q: np.ndarray
    """[B, N, H]"""


def random_batch(prompt_lens: Sequence[int], dtype: str) -> Batch:
    rng = np.random.default_rng(0)
    shapes = [(sum(prompt_lens), N, H), (sum(prompt_lens), K, H), (sum(prompt_lens), K, H), (len(prompt_lens), N, H)]
    q, k, v, next_q = (rng.standard_normal(shape, np.float32).astype(jnp.dtype(dtype)) for shape in shapes)
    # Long queries: each attends to few keys, so that a key too few or too many is seen.
    return Batch(prompt_lens=prompt_lens, q=q * 3, k=k, v=v, next_q=next_q * 3)


def choose_intervals(num_tokens: int, num_devices: int) -> list[tuple[int, int]]:
    """Which packed tokens, from start to end, each device keeps: ever more on each of the first half, no others."""
    num_keepers = -(-num_devices // 2)
    cuts = (num_tokens * np.linspace(0, 1, num_keepers + 1) ** 2).astype(int).tolist()
    return [*itertools.pairwise(cuts), *[(0, 0)] * (num_devices - num_keepers)]


def run(batch: Batch, mesh: Mesh, intervals: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Outputs of the prompts [T, N, H] and of the tokens after them [B, N, H]; seconds of prefill and of decode."""
    n, T, B = mesh.size, len(batch.q), len(batch.next_q)
    q, k, v, next_q = (stripe(x, n, fill=0) for x in (batch.q, batch.k, batch.v, batch.next_q))
    arrays = q, k, v, stripe_row_starts(batch.prompt_lens, n), kept_slots(intervals, T)
    retaining_prefill = functools.partial(prefill, pool_size=max(end - start for start, end in intervals))
    (o, pool), prefill_s = second_call(retaining_prefill, mesh, *arrays)
    next_o, decode_s = second_call(decode, mesh, next_q, pool, *decode_tables(batch, intervals))
    o, next_o = (np.asarray(x).astype(np.float32) for x in (o, next_o))
    return unstripe(o, T), unstripe(next_o, B), prefill_s, decode_s


@functools.partial(jax.jit, static_argnames="pool_size")
def prefill(q, k, v, row_starts, kept_slots, *, pool_size: int):
    """Striped outputs [n, T, N, H] and what each device kept [n, 1, 2, pool_size, 1, K, H], on whatever mesh is set."""

    def on_each_device(*shards):
        q, k, v, row_starts, kept_slots = (x[0] for x in shards)

        def visit(source_rank, k, v, pool):
            return retain(pool, jnp.int32(0), kept_slots, source_rank, k, v)

        # One layer; keys and values; pages of one token.
        pool = jnp.zeros((1, 2, pool_size, 1, *k.shape[1:]), k.dtype)
        o, _, pool = ring_attention(q, k, v, row_starts, axis_name=AXIS, visit=visit, carry=pool)
        return o[None], pool[None]

    return over_the_mesh(on_each_device)(q, k, v, row_starts, kept_slots)


@jax.jit
def decode(q, pool, page_indices, page_starts, kv_lens):
    """Outputs [n, B, N, H] of the rows that each device is master of, over what all devices kept."""

    def on_each_device(*shards):
        q, pool, *tables = (x[0] for x in shards)
        o, _ = multi_master_decode(q, pool, jnp.int32(0), *tables, axis_name=AXIS)
        return o[None]

    return over_the_mesh(on_each_device)(q, pool, page_indices, page_starts, kv_lens)


def over_the_mesh(on_each_device: Callable[..., Any]) -> Callable[..., Any]:
    """`shard_map` over whatever mesh is set."""
    # What stores keys on a GPU does not say over which axes its pool varies, so that cannot be checked.
    return jax.shard_map(on_each_device, in_specs=P(AXIS), out_specs=P(AXIS), check_vma=False)


def second_call(program: Callable[..., Any], mesh: Mesh, *arrays: np.ndarray | jax.Array) -> tuple[Any, float]:
    """The program's outputs on this mesh, and the seconds it takes once it is compiled."""
    arrays = jax.device_put(arrays, NamedSharding(mesh, P(AXIS)))
    with jax.set_mesh(mesh):
        jax.block_until_ready(program(*arrays))
        started_s = time.perf_counter()
        outputs = jax.block_until_ready(program(*arrays))
        return outputs, time.perf_counter() - started_s


def kept_slots(intervals: Sequence[tuple[int, int]], num_tokens: int) -> np.ndarray:
    """The slot in which each device keeps each token of each device, int32 [n, n, T]; -1 where it does not.

    Slot i holds the i-th token of the device's interval.
    """
    tokens = np.arange(num_tokens, dtype=np.int32)
    slots = [np.where((start <= tokens) & (tokens < end), tokens - start, np.int32(-1)) for start, end in intervals]
    return np.stack([stripe(slots_here, len(intervals), fill=-1) for slots_here in slots])


def decode_tables(batch: Batch, intervals: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each device's table of pages, and where in it which row's keys begin and how many: int32 [n, ...]."""
    n = len(intervals)
    ends = np.cumsum(batch.prompt_lens, dtype=np.int32)
    begins = ends - np.asarray(batch.prompt_lens, np.int32)
    spans = [np.clip((begins - start, ends - start), 0, end - start) for start, end in intervals]
    # In the order of the queries: by device, striped.
    page_starts = np.stack([stripe(begin, n, fill=0).ravel() for begin, _ in spans])
    kv_lens = np.stack([stripe(end - begin, n, fill=0).ravel() for begin, end in spans])
    page_indices = np.arange(max(end - start for start, end in intervals), dtype=np.int32)
    return np.stack([page_indices] * n), page_starts, kv_lens


def dense_outputs(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """What `run` should give, prompt by prompt: the next token is one more row, which sees all keys of its prompt."""
    cuts = np.cumsum(batch.prompt_lens)[:-1]
    prompts = zip(*(np.split(x, cuts) for x in (batch.q, batch.k, batch.v)), batch.next_q, strict=True)
    outputs = [causal_attention(np.concatenate([q, next_q[None]]), k, v) for q, k, v, next_q in prompts]
    return np.concatenate([o[:-1] for o in outputs]), np.stack([o[-1] for o in outputs])


def causal_attention(q_TNH: np.ndarray, k_SKH: np.ndarray, v_SKH: np.ndarray) -> np.ndarray:
    """Dense attention in float32, in which row t sees the keys 0 to t: [T, N, H]."""
    q_NTH = q_TNH.astype(np.float32).swapaxes(0, 1)
    k_NSH, v_NSH = (np.repeat(x.astype(np.float32), N // K, axis=1).swapaxes(0, 1) for x in (k_SKH, v_SKH))
    scores_NTS = q_NTH @ k_NSH.swapaxes(1, 2) * np.float32(H**-0.5)
    scores_NTS[:, ~np.tri(*scores_NTS.shape[1:], dtype=bool)] = -np.inf
    weights_NTS = np.exp(scores_NTS - scores_NTS.max(axis=-1, keepdims=True))
    return (weights_NTS @ v_NSH / weights_NTS.sum(axis=-1, keepdims=True)).swapaxes(0, 1)


if __name__ == "__main__":
    main()
