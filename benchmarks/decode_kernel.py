"""Speed of decode attention's Triton variant beside a device-to-device copy, on random data that no L2 holds.

    python -m benchmarks.decode_kernel --out benchmarks/results/decode_kernel.json

Times are slopes between n and 2n repetitions, and on a GPU they are traced, too: the span from the start of an op's
first kernel to the end of its last, and each kernel's own time, with the launches queued ahead. Slopes hold what a
launch costs; of requests so short that a repetition is over before the next is launched, little else.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import report
from loongjax.pallas_kernels.decode_attention.triton_variant import TUNING, triton_decode_attention
from loongjax.pallas_kernels.paged_triton.launch import PagedTuning
from loongjax_profiling.kernels.device_trace import device_times
from loongjax_profiling.kernels.timing import copy_bytes_per_second, device_seconds

HEAD_DIM = 128
POOL_BYTES = 1e9
"""At least; more than ten times an H200's L2. Repetitions go through the layers, so that none finds its keys there."""
SHORT_BYTES = 1e8
"""Cases with less to read are traced."""
REPETITIONS = 20
SHORT_REPETITIONS = 100
TRACED_REPETITIONS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    kv_lens: Sequence[int]
    heads: tuple[int, int]
    page_size: int

    @property
    def num_bytes(self) -> int:
        """Keys and values that have to be read, in bfloat16."""
        return sum(self.kv_lens) * self.heads[1] * HEAD_DIM * 2 * 2

    @property
    def is_short(self) -> bool:
        return self.num_bytes < SHORT_BYTES


MIXES: dict[str, tuple[list[int], tuple[int, int]]] = {
    "32 x 16K, 32/8": ([16384] * 32, (32, 8)),
    "8 x 16K, 32/32": ([16384] * 8, (32, 32)),
    "1 x 256K, 32/8": ([262144], (32, 8)),
    "1 x 128K, 32/8": ([131072], (32, 8)),
    "256 x 1K, 32/8": ([1024] * 256, (32, 8)),
    "1 x 128K + 255 x 1K, 32/8": ([131072] + [1024] * 255, (32, 8)),
    "1 x 1K, 32/8": ([1024], (32, 8)),
}
TUNED_ON = (("32 x 16K, 32/8", 16), ("256 x 1K, 32/8", 16), ("32 x 16K, 32/8", 1), ("1 x 1K, 32/8", 16))
TUNINGS = [
    PagedTuning(block=block, stages=stages, num_warps=warps, programs_per_processor=programs)
    for block, stages, warps, programs in [(64, 3, 4, 3), (64, 2, 4, 3), (64, 2, 4, 4), (32, 3, 4, 5), (32, 2, 4, 6)]
]


def build(case: Case, tuning: PagedTuning, *, pool_bytes: float) -> Callable[[int], Callable[[], Any]]:
    """Makes a jitted call of so many repetitions, each on the output of the one before and on the next layer's keys."""
    rng = np.random.default_rng(0)
    pages_of = [-(-kv_len // case.page_size) for kv_len in case.kv_lens]
    num_pages, (num_q_heads, num_kv_heads) = sum(pages_of), case.heads
    num_layers = max(1, math.ceil(pool_bytes / case.num_bytes))
    shape = (num_layers, 2, num_pages, case.page_size, num_kv_heads, HEAD_DIM)
    pool = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
    q = jax.random.normal(jax.random.key(1), (len(case.kv_lens), num_q_heads, HEAD_DIM), jnp.bfloat16)
    tables = (
        jnp.asarray(rng.permutation(num_pages), jnp.int32),
        jnp.asarray(np.cumsum([0, *pages_of[:-1]]), jnp.int32),
        jnp.asarray(case.kv_lens, jnp.int32),
    )
    settings: dict[str, Any] = {"sm_scale": HEAD_DIM**-0.5, "out_dtype": np.dtype(q.dtype), "tuning": tuning}

    def repeat(num: int) -> Callable[[], jax.Array]:
        @jax.jit
        def run(pool: jax.Array, q: jax.Array) -> jax.Array:
            for i in range(num):  # a loop would launch kernels of its own to count
                q, _ = triton_decode_attention(q, pool, jnp.int32(i % num_layers), *tables, **settings)
            return q

        return lambda: run(pool, q)

    return repeat


def measure(case: Case, tuning: PagedTuning) -> dict[str, Any]:
    """Microseconds of one call by slope and by trace, of short ones with their keys in memory and in L2."""
    repeat = build(case, tuning, pool_bytes=POOL_BYTES)
    seconds = device_seconds(repeat, SHORT_REPETITIONS if case.is_short else REPETITIONS)
    row: dict[str, Any] = {"us": round(seconds * 1e6, 2), "bytes_per_second": round(case.num_bytes / seconds)}
    if jax.default_backend() != "gpu":
        return row
    pools = {"memory": POOL_BYTES} | ({"l2": 0.0} if case.is_short else {})
    for keys_in, pool_bytes in pools.items():
        name = f"trace_keys_in_{keys_in}"
        try:
            num_traced = TRACED_REPETITIONS if case.is_short else REPETITIONS
            times = device_times(build(case, tuning, pool_bytes=pool_bytes), num_traced)
        except Exception as error:  # the slope stands without it
            traceback.print_exc()
            row[name] = repr(error)[:300]
            continue
        row[name] = {
            "span_us": round(times.span_s * 1e6, 2),
            "period_us": round(times.period_s * 1e6, 2),
            "bytes_per_second": round(case.num_bytes / times.period_s),
            "kernels_us": {name: round(seconds * 1e6, 2) for name, seconds in times.kernel_s.items()},
        }
    return row


def describe(row: dict[str, Any]) -> str:
    head = f"{row['mix']:28} page {row['page_size']:2}"
    if "error" in row:
        return f"{head} {row['error']}"
    line = f"{head} {row['us']:8.1f} us {row['bytes_per_second'] / 1e12:6.3f} TB/s {row['of_copy']:6.1%}"
    for name, trace in row.items():
        if name.startswith("trace"):
            line += f"\n    {name.replace('_', ' ')}: {trace}"
    return f"{line}  {list(row['tuning'].values())}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixes", nargs="+", choices=MIXES, default=list(MIXES), metavar="MIX")
    parser.add_argument("--page-sizes", nargs="+", type=int, default=[16, 64, 1])
    parser.add_argument("--tune", action="store_true", help="first compare ways to cut the work")
    report.add_arguments(parser)
    args = parser.parse_args()
    about = report.origin("decode_kernel", None, args.commit)
    copy_rate = copy_bytes_per_second()
    print(f"copy: {copy_rate / 1e12:.3f} TB/s", flush=True)
    rows = []

    def record(mix: str, page_size: int, tuning: PagedTuning) -> None:
        kv_lens, heads = MIXES[mix]
        row: dict[str, Any] = {"mix": mix, "page_size": page_size, "tuning": dataclasses.asdict(tuning)}
        try:
            row |= measure(Case(kv_lens=kv_lens, heads=heads, page_size=page_size), tuning)
            row["of_copy"] = round(row["bytes_per_second"] / copy_rate, 4)
            for trace in (row[name] for name in row if name.startswith("trace") and isinstance(row[name], dict)):
                trace["of_copy"] = round(trace["bytes_per_second"] / copy_rate, 4)
        except Exception as error:
            traceback.print_exc()
            row["error"] = repr(error)[:300]
        rows.append(row)
        print(describe(row), flush=True)

    if args.tune:
        for tuning in TUNINGS:
            for mix, page_size in TUNED_ON:
                record(mix, page_size, tuning)
    for page_size in args.page_sizes:
        for mix in args.mixes:
            record(mix, page_size, TUNING)
    report.write(args.out, about | {"copy_bytes_per_second": round(copy_rate)}, rows)


if __name__ == "__main__":
    main()
