"""Speed of decode attention's Triton variant beside a device-to-device copy, on random data.

python -m benchmarks.decode_kernel --out benchmarks/results/decode_kernel.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
import traceback
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from loongjax.pallas_kernels.decode_attention.triton_variant import triton_decode_attention
from loongjax.pallas_kernels.paged_triton.launch import PagedTuning
from loongjax_profiling.kernels.timing import copy_bytes_per_second, device_seconds

HEAD_DIM = 128
SHORT_BYTES = 1e8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    kv_lens: Sequence[int]
    heads: tuple[int, int]
    page_size: int

    @property
    def num_bytes(self) -> int:
        """Keys and values that have to be read, in bfloat16."""
        return sum(self.kv_lens) * self.heads[1] * HEAD_DIM * 2 * 2


MIXES: dict[str, tuple[list[int], tuple[int, int]]] = {
    "32 x 16K, 32/8": ([16384] * 32, (32, 8)),
    "8 x 16K, 32/32": ([16384] * 8, (32, 32)),
    "1 x 128K, 32/8": ([131072], (32, 8)),
    "256 x 1K, 32/8": ([1024] * 256, (32, 8)),
    "1 x 128K + 255 x 1K, 32/8": ([131072] + [1024] * 255, (32, 8)),
    "1 x 1K, 32/8": ([1024], (32, 8)),
}
TUNED_ON = (("32 x 16K, 32/8", 16), ("256 x 1K, 32/8", 16), ("32 x 16K, 32/8", 1), ("1 x 1K, 32/8", 16))
TUNINGS = [
    PagedTuning(block=block, stages=stages, num_warps=warps, programs_per_processor=programs)
    for block, stages, warps, programs in [(64, 2, 4, 3), (64, 3, 4, 2), (32, 3, 4, 4), (32, 2, 4, 6), (64, 2, 8, 3)]
]


def measure(case: Case, tuning: PagedTuning) -> float:
    """Seconds of one call."""
    rng = np.random.default_rng(0)
    pages_of = [-(-kv_len // case.page_size) for kv_len in case.kv_lens]
    num_pages, (num_q_heads, num_kv_heads) = sum(pages_of), case.heads
    shape = (1, 2, num_pages, case.page_size, num_kv_heads, HEAD_DIM)
    pool = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
    q = jax.random.normal(jax.random.key(1), (len(case.kv_lens), num_q_heads, HEAD_DIM), jnp.bfloat16)
    tables = (
        jnp.asarray(rng.permutation(num_pages), jnp.int32),
        jnp.asarray(np.cumsum([0, *pages_of[:-1]]), jnp.int32),
        jnp.asarray(case.kv_lens, jnp.int32),
    )

    def repeat(num: int) -> Callable[[], jax.Array]:
        @jax.jit
        def run(pool: jax.Array, q: jax.Array) -> jax.Array:
            def step(_: jax.Array, q: jax.Array) -> jax.Array:
                o, _ = triton_decode_attention(
                    q, pool, jnp.int32(0), *tables, sm_scale=HEAD_DIM**-0.5, out_dtype=np.dtype(q.dtype), tuning=tuning
                )
                return o

            if case.num_bytes < SHORT_BYTES:
                for _ in range(num):  # a loop launches a kernel of its own to count
                    q = step(q, q)
                return q
            return jax.lax.fori_loop(0, num, step, q)

        return lambda: run(pool, q)

    return device_seconds(repeat, 20 if case.num_bytes > SHORT_BYTES else 100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--commit")
    parser.add_argument("--tune", action="store_true", help="first compare ways to cut the work")
    args = parser.parse_args()
    copy_rate = copy_bytes_per_second()
    print(f"copy: {copy_rate / 1e12:.3f} TB/s", flush=True)
    rows = []

    def record(mix: str, page_size: int, tuning: PagedTuning) -> None:
        kv_lens, heads = MIXES[mix]
        case = Case(kv_lens=kv_lens, heads=heads, page_size=page_size)
        row = {"mix": mix, "page_size": page_size, "tuning": dataclasses.asdict(tuning)}
        try:
            seconds = measure(case, tuning)
        except Exception:
            traceback.print_exc()
            return
        rate = case.num_bytes / seconds
        row |= {"us": seconds * 1e6, "bytes_per_second": rate, "of_copy": rate / copy_rate}
        rows.append(row)
        print(
            f"{mix:28} page {page_size:2} {seconds * 1e6:8.1f} us {rate / 1e12:6.3f} TB/s {rate / copy_rate:6.1%}",
            *dataclasses.astuple(tuning),
            flush=True,
        )

    if args.tune:
        for tuning in TUNINGS:
            for mix, page_size in TUNED_ON:
                record(mix, page_size, tuning)
    for page_size in (16, 1, 64):
        for mix in MIXES:
            record(mix, page_size, PagedTuning())
    result = {
        "command": "python -m benchmarks.decode_kernel " + " ".join(sys.argv[1:]),
        "hardware": f"{len(jax.devices())} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
        "commit": args.commit,
        "copy_bytes_per_second": copy_rate,
        "rows": rows,
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
