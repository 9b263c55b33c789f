"""prefill_attention's Hopper kernel beside cuDNN, in TFLOP/s of visible pairs.

    python -m benchmarks.prefill_kernel --out benchmarks/results/prefill_kernel_1xH200.json

A row is timed as the slope between one and three calls of a program that runs the op `repeats` times, each on the
output of the one before. The first shape is run with every tuning named, the others with the first tuning alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pathlib
import statistics
import sys
import time
import traceback
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from loongjax.pallas_kernels.prefill_attention.mosaic_gpu import mosaic_gpu_prefill_attention
from loongjax.pallas_kernels.prefill_attention.mosaic_gpu_kernel import PrefillTuning

HEAD_DIM = 128
PROMPT_LEN = 1024
"""Tokens of each prompt of the packed mask."""
TUNINGS = {
    "default": PrefillTuning(),
    "in_order": PrefillTuning(overlap=False),
    "in_order_turns": PrefillTuning(overlap=False, take_turns=True),
    "q192_kv64": PrefillTuning(block_q=192, block_kv=64, num_stages=4),
    "q192_kv64_in_order": PrefillTuning(block_q=192, block_kv=64, num_stages=4, overlap=False),
    "kv192_in_order": PrefillTuning(block_kv=192, overlap=False),
    "three_stages": PrefillTuning(num_stages=3),
}
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One row of the table."""

    mask: str
    length: int
    """Tokens: queries and keys."""
    num_q_heads: int
    num_kv_heads: int

    @property
    def prompt_len(self) -> int:
        return PROMPT_LEN if self.mask == "packed" else self.length

    def ranges(self) -> tuple[np.ndarray, np.ndarray]:
        """k_start and k_end of each row."""
        own = np.arange(self.length, dtype=np.int32)
        k_start = own // self.prompt_len * self.prompt_len
        return k_start, own * 0 + self.length if self.mask == "full" else own + 1

    @property
    def flops(self) -> int:
        """Of the visible pairs: two products of 2 H operations each."""
        k_start, k_end = self.ranges()
        return int((k_end - k_start).sum(dtype=np.int64)) * self.num_q_heads * 4 * HEAD_DIM


def ours(shape: Shape, tuning: PrefillTuning) -> Attend:
    k_start, k_end = map(jnp.asarray, shape.ranges())
    return lambda q, k, v: mosaic_gpu_prefill_attention(
        q, k, v, k_start, k_end, sm_scale=HEAD_DIM**-0.5, out_dtype=q.dtype, tuning=tuning
    )


def cudnn(shape: Shape) -> Attend:
    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        batches = (x.reshape(-1, shape.prompt_len, *x.shape[1:]) for x in (q, k, v))
        is_causal = shape.mask != "full"
        o, lse = jax.nn.dot_product_attention(
            *batches, is_causal=is_causal, implementation="cudnn", return_residual=True
        )
        return o.reshape(q.shape), lse

    return attend


def measure(attend: Attend, shape: Shape, samples: int) -> tuple[dict[str, float], np.ndarray]:
    """TFLOP/s and seconds, and the first output."""
    keys = jax.random.split(jax.random.key(0), 3)
    heads = (shape.num_q_heads, shape.num_kv_heads, shape.num_kv_heads)
    q, k, v = (
        jax.random.normal(key, (shape.length, n, HEAD_DIM), jnp.bfloat16) for key, n in zip(keys, heads, strict=True)
    )
    repeats = max(1, round(0.01 / (shape.flops / 600e12)))

    @functools.partial(jax.jit, donate_argnums=0)
    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        def repeat(_, q: jax.Array) -> jax.Array:
            # One element is enough to make each repetition wait for the one before.
            return q.at[0, 0, 0].add(attend(q, k, v)[0][0, 0, 0] * 1e-3)

        return jax.lax.fori_loop(0, repeats, repeat, q)

    def seconds(num_calls: int) -> float:
        nonlocal q
        q.block_until_ready()
        started = time.perf_counter()
        for _ in range(num_calls):
            q = run(q, k, v)
        q.block_until_ready()
        return time.perf_counter() - started

    started = time.perf_counter()
    first = np.asarray(jax.jit(attend)(q, k, v)[0][: shape.prompt_len].astype(jnp.float32))
    seconds(2)
    warm_up_s = time.perf_counter() - started
    slopes = [(seconds(3) - seconds(1)) / (2 * repeats) for _ in range(samples)]
    rates = sorted(shape.flops / slope / 1e12 for slope in slopes)
    row = {
        "tflops": statistics.median(rates),
        "lowest": rates[0],
        "highest": rates[-1],
        "seconds": statistics.median(slopes),
        "repeats": repeats,
        "warm_up_s": warm_up_s,
    }
    return row, first


def measure_all(shape: Shape, variants: dict[str, Attend], samples: int) -> list[dict[str, object]]:
    """One row a variant; a variant that fails is printed, and does not stop the others."""
    rows, truth = [], None
    for name, attend in variants.items():
        row: dict[str, object] = {**dataclasses.asdict(shape), "variant": name}
        try:
            numbers, first = measure(attend, shape, samples)
        except Exception as error:
            traceback.print_exc()
            row["error"] = repr(error)[:500]
        else:
            truth = first if truth is None else truth
            row |= {**numbers, "difference": float(np.abs(first - truth).max())}
        rows.append(row)
        print(json.dumps({key: round(x, 5) if isinstance(x, float) else x for key, x in row.items()}), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--masks", nargs="+", choices=("causal", "full", "packed"), default=["causal", "full"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[16_384, 4_096, 65_536])
    parser.add_argument("--heads", nargs="+", default=["32/8", "32/32", "8/1"], help="query heads / KV heads")
    parser.add_argument("--tunings", nargs="+", choices=TUNINGS, default=list(TUNINGS))
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--commit", help="of this code")
    args = parser.parse_args()

    rows: list[dict[str, object]] = []
    tunings = args.tunings
    for length in args.lengths:
        for heads in args.heads:
            for mask in args.masks:
                num_q_heads, num_kv_heads = map(int, heads.split("/"))
                shape = Shape(mask=mask, length=length, num_q_heads=num_q_heads, num_kv_heads=num_kv_heads)
                variants = {"cudnn": cudnn(shape)} | {name: ours(shape, TUNINGS[name]) for name in tunings}
                rows += measure_all(shape, variants, args.samples)
            tunings = args.tunings[:1]
    result = {
        "command": "python -m benchmarks.prefill_kernel " + " ".join(sys.argv[1:]),
        "hardware": f"1 x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
        "commit": args.commit,
        "rows": rows,
    }
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
