"""Speed of extend attention beside prefill attention over the same pairs, on random data.

python -m benchmarks.extend_kernel --out benchmarks/results/extend_kernel_1xH200.json
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import pathlib
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from loongjax.pallas_kernels.extend_attention.mosaic_gpu import DEFAULT_TUNING as MOSAIC_TUNING
from loongjax.pallas_kernels.extend_attention.mosaic_gpu import mosaic_gpu_extend_attention
from loongjax.pallas_kernels.extend_attention.triton_variant import TUNING, triton_extend_attention
from loongjax.pallas_kernels.paged_triton.launch import PagedTuning
from loongjax.pallas_kernels.prefill_attention.mosaic_gpu import mosaic_gpu_prefill_attention
from loongjax.pallas_kernels.prefill_attention.mosaic_gpu_tuning import PrefillTuning
from loongjax_profiling.kernels.timing import SlopeTimer, sample_in_turn
from loongjax_profiling.provenance import checked_out_commit

HEAD_DIM = 128
CASES = [(512, 32768, (32, 8)), (512, 131072, (32, 8)), (4, 131072, (32, 8)), (512, 32768, (32, 32))]
"""New tokens, keys before them, heads."""
SAMPLES = 9
TUNINGS = [
    TUNING,
    PagedTuning(block=64, stages=2, num_warps=8, programs_per_processor=2),
    PagedTuning(block=128, stages=2, num_warps=8, programs_per_processor=1),
]
Attend = Callable[[Any, jax.Array], jax.Array]
"""The op, given its keys and values and the queries."""


def random_normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def extend(
    num_keys: int, num_kv_heads: int, page_size: int, tuning: PagedTuning | PrefillTuning
) -> tuple[Attend, jax.Array]:
    """The op over a randomly permuted table, given its pool, by the variant whose tuning it is."""
    variant = triton_extend_attention if isinstance(tuning, PagedTuning) else mosaic_gpu_extend_attention
    num_pages = num_keys // page_size
    pool = random_normal(0, 1, 2, num_pages, page_size, num_kv_heads, HEAD_DIM)
    table = jnp.asarray(np.random.default_rng(0).permutation(num_pages), jnp.int32)

    def attend(pool: jax.Array, q: jax.Array) -> jax.Array:
        cu_q_lens, start = jnp.array([0, q.shape[0]], jnp.int32), jnp.zeros(1, jnp.int32)
        tables = (table, start, start + num_keys)
        settings = {"sm_scale": HEAD_DIM**-0.5, "out_dtype": np.dtype(q.dtype), "tuning": tuning}
        return variant(q, cu_q_lens, pool, jnp.int32(0), *tables, **settings)[0]

    return attend, pool


def prefill(num_keys: int, num_kv_heads: int) -> tuple[Attend, tuple[jax.Array, jax.Array]]:
    """The same pairs by the prefill kernel, over keys and values that lie in order."""
    k, v = (random_normal(seed, num_keys, num_kv_heads, HEAD_DIM) for seed in (2, 3))

    def attend(kv: tuple[jax.Array, jax.Array], q: jax.Array) -> jax.Array:
        zero = jnp.zeros(q.shape[0], jnp.int32)
        settings = {"sm_scale": HEAD_DIM**-0.5, "out_dtype": np.dtype(q.dtype)}
        return mosaic_gpu_prefill_attention(q, *kv, zero, zero + num_keys, **settings)[0]

    return attend, (k, v)


def timer(attend: Attend, keys: Any, num_new: int, num_q_heads: int, flops: float) -> SlopeTimer:
    """Of one call, each on the output of the one before."""
    q = random_normal(1, num_new, num_q_heads, HEAD_DIM)

    def repeat(num: int) -> Callable[[], jax.Array]:
        run = jax.jit(lambda keys, q: jax.lax.fori_loop(0, num, lambda _, q: attend(keys, q), q))
        return lambda: run(keys, q)

    return SlopeTimer(repeat, max(4, round(0.01 / (flops / 400e12))))


def compare(
    num_new: int, num_keys: int, heads: tuple[int, int], tunings: Sequence[PagedTuning]
) -> list[dict[str, Any]]:
    """One row a variant, timed in turn; one that fails says why, and does not stop the others."""
    num_q_heads, num_kv_heads = heads
    flops = 4.0 * num_new * num_keys * num_q_heads * HEAD_DIM
    variants: dict[str, Callable[[], tuple[Attend, Any]]] = {
        "prefill_attention": lambda: prefill(num_keys, num_kv_heads)
    }
    for tuning, page_size in [*((MOSAIC_TUNING, size) for size in (1, 16, 64)), *itertools.product(tunings, (16, 1))]:
        implementation = "triton" if isinstance(tuning, PagedTuning) else "mosaic_gpu"
        name = f"{implementation}, page size {page_size}, {dataclasses.astuple(tuning)}"
        variants[name] = functools.partial(extend, num_keys, num_kv_heads, page_size, tuning)
    rows, timers = {}, {}
    for name, make in variants.items():
        rows[name] = {"new": num_new, "keys": num_keys, "heads": f"{num_q_heads}/{num_kv_heads}", "variant": name}
        try:
            timers[name] = timer(*make(), num_new, num_q_heads, flops)
        except Exception as error:
            traceback.print_exc()
            rows[name]["error"] = repr(error)[:300]
    sample_in_turn(list(timers.values()), SAMPLES)
    for name, timed in timers.items():
        rows[name] |= {"us": round(timed.seconds * 1e6, 1), "tflops": round(flops / timed.seconds / 1e12, 1)}
        if "prefill_attention" in timers:
            rows[name]["of_prefill"] = round(timers["prefill_attention"].seconds / timed.seconds, 4)
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="every tuning of the Triton variant, on the first case")
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--commit", default=checked_out_commit(), help="of this code, where git cannot be asked")
    args = parser.parse_args()
    result: dict[str, Any] = {
        "command": "python -m benchmarks.extend_kernel " + " ".join(sys.argv[1:]),
        "hardware": f"{len(jax.devices())} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
        "commit": args.commit,
        "rows": [],
    }
    for number, (num_new, num_keys, heads) in enumerate(CASES):
        rows = compare(num_new, num_keys, heads, TUNINGS if args.tune and number == 0 else TUNINGS[:1])
        result["rows"] += rows
        print(*map(json.dumps, rows), sep="\n", flush=True)
        if args.out:
            args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
