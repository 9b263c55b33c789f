"""prefill_attention's Hopper kernel beside cuDNN and tokamax, in TFLOP/s of visible pairs, on random data.

    python -m benchmarks.prefill_kernel --out benchmarks/results/prefill_kernel_1xH200.json
    python -m benchmarks.prefill_kernel --masks 64x1K 1x32K+32x1K zipf ring2 ring4 ring8 zipf_ring4

A row is timed as the slope between one and three calls of a program that runs the op `repeats` times, one after the
other; the variants of a row take turns. Its differences are those to the float32 reference on some
of the rows. Packed prompts and ring steps are compared with our own causal rate over as many tokens, too. A rival that
is not installed is left out.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import random
import statistics
import time
import traceback
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import report
from loongjax.pallas_kernels.prefill_attention.mosaic_gpu import mosaic_gpu_prefill_attention
from loongjax.pallas_kernels.prefill_attention.mosaic_gpu_keys import TMA_ROWS
from loongjax.pallas_kernels.prefill_attention.mosaic_gpu_tuning import PrefillTuning
from loongjax.pallas_kernels.prefill_attention.reference import reference_prefill_attention
from loongjax.pallas_kernels.prefill_attention.visits import plan_visits
from loongjax_profiling.kernels.dense import Ranges, causal, full, num_pairs, ring_step, zipf_lengths
from loongjax_profiling.kernels.rivals import RIVALS, Rival, installed_rivals

HEAD_DIM = 128
SM_SCALE = HEAD_DIM**-0.5
PROGRAM_S = 0.01
"""What the repetitions of a program take together, about."""
SAMPLING_S = 4.0
"""What the samples of a row may take; there are two at least."""
NUM_CHECKED_ROWS = 32
RING_ROWS = 16_384
"""Tokens of each rank."""
DENSE_MASKS = ("causal", "full")
MIXES: dict[str, Callable[[], Ranges]] = {
    "64x1K": lambda: causal([1024] * 64),
    "1x32K+32x1K": lambda: causal([32_768] + [1024] * 32),
    "zipf": lambda: causal(zipf_lengths(65_536)),
    "ring2": lambda: ring_step([2 * RING_ROWS], 2),
    "ring4": lambda: ring_step([4 * RING_ROWS], 4),
    "ring8": lambda: ring_step([8 * RING_ROWS], 8),
    "zipf_ring4": lambda: ring_step(zipf_lengths(4 * RING_ROWS), 4),
}
"""Packed prompts, and a rank's step over another's keys in the striped layout; their lengths are their own."""
TUNINGS = {
    "default": PrefillTuning(),
    "not_dealt_out": PrefillTuning(num_programs=2**30),
    "q192_kv64": PrefillTuning(block_q=192, block_kv=64, num_stages=3),
    "kv64": PrefillTuning(block_kv=64, num_stages=4),
    "all_heads": PrefillTuning(num_heads_abreast=2**10),
    "abreast1": PrefillTuning(num_heads_abreast=1),
    "abreast2": PrefillTuning(num_heads_abreast=2),
    "abreast4": PrefillTuning(num_heads_abreast=4),
    "abreast8": PrefillTuning(num_heads_abreast=8),
}
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
"""Output and log-sum-exp, [T, N, H] and [T, N]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What every variant of some rows is given."""

    mask: str
    ranges: Ranges = dataclasses.field(repr=False)
    num_q_heads: int
    num_kv_heads: int

    @property
    def num_tokens(self) -> int:
        """Queries and keys."""
        return len(self.ranges[0])

    @property
    def heads(self) -> str:
        """Query heads / KV heads."""
        return f"{self.num_q_heads}/{self.num_kv_heads}"

    @property
    def batch_size(self) -> int | None:
        """Prompts, if they are equal and dense, so that rivals can do the same work; else None."""
        if self.mask in DENSE_MASKS:
            return 1
        return 64 if self.mask == "64x1K" else None

    @property
    def flops(self) -> int:
        """Of the visible pairs: two products of 2 H operations each."""
        return num_pairs(self.ranges) * self.num_q_heads * 4 * HEAD_DIM


def make_work(mask: str, num_tokens: int, heads: str) -> Work:
    """`num_tokens` is for dense masks, heads such as "32/8"."""
    num_q_heads, num_kv_heads = map(int, heads.split("/"))
    dense = {"causal": lambda: causal([num_tokens]), "full": lambda: full(num_tokens)}
    ranges = (dense | MIXES)[mask]()
    return Work(mask=mask, ranges=ranges, num_q_heads=num_q_heads, num_kv_heads=num_kv_heads)


def ours(work: Work, tuning: PrefillTuning) -> Attend:
    k_start, k_end = map(jnp.asarray, work.ranges)
    return lambda q, k, v: mosaic_gpu_prefill_attention(
        q, k, v, k_start, k_end, sm_scale=SM_SCALE, out_dtype=q.dtype, tuning=tuning
    )


def rival(work: Work, attention: Rival) -> Attend:
    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        batches = (x.reshape(work.batch_size, -1, *x.shape[1:]) for x in (q, k, v))
        o, lse = attention(*batches, is_causal=work.mask != "full")
        return o.reshape(q.shape), lse.reshape(q.shape[:2])

    return attend


def random_inputs(work: Work) -> tuple[jax.Array, jax.Array, jax.Array]:
    def draw(seed: int, num_heads: int) -> jax.Array:
        return jax.random.normal(jax.random.key(seed), (work.num_tokens, num_heads, HEAD_DIM), jnp.bfloat16)

    return draw(0, work.num_q_heads), draw(1, work.num_kv_heads), draw(2, work.num_kv_heads)


def num_visited_pairs(work: Work, tuning: PrefillTuning) -> int:
    """Pairs that our kernel computes for one head: every visited key block, for every row of the query block."""
    bounds = np.pad(np.stack(work.ranges), ((0, 0), (0, -work.num_tokens % tuning.block_q)), mode="edge")
    visits = plan_visits(
        *jnp.asarray(bounds),
        num_keys=work.num_tokens,
        block_q=tuning.block_q,
        block_kv=tuning.block_kv,
        alignment=TMA_ROWS,
    )
    return int(np.asarray(visits.num_blocks, np.int64).sum()) * tuning.block_q * tuning.block_kv


def reference_rows(work: Work, inputs: tuple[jax.Array, ...], rows: np.ndarray) -> list[np.ndarray]:
    """Output and log-sum-exp of some of the query rows, in float32."""
    q, k, v = inputs
    k_start, k_end = (jnp.asarray(x[rows]) for x in work.ranges)
    results = reference_prefill_attention(
        q[rows], k, v, k_start, k_end, sm_scale=SM_SCALE, out_dtype=np.dtype(np.float32)
    )
    return [np.asarray(x) for x in results]


def largest_difference(found: jax.Array, truth: np.ndarray) -> float:
    """Rows without keys have a log-sum-exp of -inf in both."""
    found_f32 = np.asarray(found, np.float32)
    return float(np.where(found_f32 == truth, 0.0, np.abs(found_f32 - np.where(np.isinf(truth), 0.0, truth))).max())


class Program:
    """One variant of the op on some work, compiled; no device has run or holds anything of it.

    Args:
        attend: the variant.
        work: what it is to do.
    """

    def __init__(self, attend: Attend, work: Work) -> None:
        started = time.perf_counter()
        operands = jax.eval_shape(lambda: random_inputs(work))
        self.repeats = max(1, round(PROGRAM_S / (work.flops / 600e12)))

        def wait(q: jax.Array, token: jax.Array) -> tuple[jax.Array, jax.Array]:
            # Each repetition waits for the one before, and nothing large is carried: XLA would copy it. The token has
            # to come back and to count, or XLA would leave out the repetitions whose output nobody sees.
            return jax.lax.optimization_barrier((q, token))

        def run(token: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, rows: jax.Array) -> list[jax.Array]:
            def repeat(_, token: jax.Array) -> jax.Array:
                awaited, token = wait(q, token)
                return token / 2 + attend(awaited, k, v)[0][0, 0, 0].astype(jnp.float32)

            token = jax.lax.fori_loop(1, self.repeats, repeat, token)
            awaited, token = wait(q, token)
            o, lse = attend(awaited, k, v)
            return [token / 2 + o[0, 0, 0].astype(jnp.float32), o[rows], lse[rows]]

        rows = jax.ShapeDtypeStruct((NUM_CHECKED_ROWS,), jnp.int32)
        self.run = jax.jit(run).lower(jax.ShapeDtypeStruct((), jnp.float32), *operands, rows).compile()
        self.compile_s = time.perf_counter() - started


class Timer:
    """A program and what it runs on: inputs, and the rows that it gives back.

    None may run before all are compiled: a first run may not fall into the time in which another thread records a CUDA
    graph.
    """

    def __init__(self, program: Program, work: Work, inputs: tuple[jax.Array, ...], rows: np.ndarray) -> None:
        self._program, self._flops = program, work.flops
        self._operands = (*inputs, jnp.asarray(rows))
        self._token = jnp.float32(0)
        self._slopes: list[float] = []
        self._checks: dict[str, float] = {"compile_s": program.compile_s}

    def check(self, truth: list[np.ndarray]) -> float:
        """Compares the rows with `reference_rows`, warms up, and gives the seconds of one call."""
        _, *found = self._program.run(self._token, *self._operands)
        differences = [largest_difference(*pair) for pair in zip(found, truth, strict=True)]
        self._checks |= {"difference": differences[0], "lse_difference": differences[1]}
        self._seconds(1)
        return self._seconds(1)

    def _seconds(self, num_calls: int) -> float:
        started = time.perf_counter()
        for _ in range(num_calls):
            self._token, *_ = self._program.run(self._token, *self._operands)
        self._token.block_until_ready()
        return time.perf_counter() - started

    def sample(self) -> None:
        """One more slope between three calls and one."""
        self._slopes.append((self._seconds(3) - self._seconds(1)) / (2 * self._program.repeats))

    @property
    def numbers(self) -> dict[str, Any]:
        """TFLOP/s and seconds, and the differences to the truth."""
        rates = sorted(self._flops / slope / 1e12 for slope in self._slopes)
        return {
            "tflops": statistics.median(rates),
            "lowest": rates[0],
            "highest": rates[-1],
            "seconds": statistics.median(self._slopes),
            "repeats": self._program.repeats,
            **self._checks,
        }


class Table:
    """Rows as they come, and what they are compared with.

    Args:
        rivals: by name.
        tunings: of our kernel, by name.
        samples: of each variant, where they do not take too long.
    """

    def __init__(self, rivals: dict[str, Rival], tunings: list[str], samples: int) -> None:
        self.rows: list[dict[str, Any]] = []
        self._rivals, self._tunings, self._samples = rivals, tunings, samples
        self._rng = random.Random(0)
        self._causal_rates: dict[tuple[str, str, int], float] = {}

    def add(self, work: Work) -> None:
        """One row a variant; a variant that fails is printed, and does not stop the others."""
        inputs = random_inputs(work)
        checked = np.linspace(0, work.num_tokens - 1, NUM_CHECKED_ROWS, dtype=np.int32)
        rivals = self._rivals if work.batch_size is not None else {}
        variants = {name: rival(work, attention) for name, attention in rivals.items()}
        variants |= {name: ours(work, TUNINGS[name]) for name in self._tunings}
        with concurrent.futures.ThreadPoolExecutor() as pool:
            programs = {name: pool.submit(Program, attend, work) for name, attend in variants.items()}
        truth = reference_rows(work, inputs, checked)
        rows = {
            name: {"mask": work.mask, "length": work.num_tokens, "heads": work.heads, "variant": name}
            for name in programs
        }
        timers: dict[str, Timer] = {}
        longest = 0.0
        for name, program in programs.items():
            try:
                timer = Timer(program.result(), work, inputs, checked)
                longest = max(longest, timer.check(truth))
                timers[name] = timer
            except Exception as error:
                traceback.print_exception(error)
                rows[name]["error"] = repr(error)[:500]
        # In turn and in any order: a GPU's clock falls under load, and rises behind what takes less power.
        for _ in range(max(3, min(self._samples, round(SAMPLING_S / (4 * longest or SAMPLING_S))))):
            for timer in self._rng.sample(list(timers.values()), len(timers)):
                timer.sample()
        rival_rates: list[float] = []
        for name, row in rows.items():
            if name in timers:
                row |= timers[name].numbers
                if name not in TUNINGS:
                    rival_rates.append(row["tflops"])
                else:
                    row["visible_of_visited"] = num_pairs(work.ranges) / num_visited_pairs(work, TUNINGS[name])
                    row |= self._compare(row, rival_rates)
            self.rows.append({key: round(x, 5) if isinstance(x, float) else x for key, x in row.items()})
            print(json.dumps(self.rows[-1]), flush=True)

    def _compare(self, row: dict[str, Any], rival_rates: list[float]) -> dict[str, float]:
        """Shares of the fastest rival's rate, and of our own causal rate over as many tokens."""
        key = (row["variant"], row["heads"], row["length"])
        if row["mask"] == "causal":
            self._causal_rates[key] = row["tflops"]
        shares = {"of_rival": row["tflops"] / max(rival_rates)} if rival_rates else {}
        if row["mask"] in MIXES and key in self._causal_rates:
            shares["of_causal"] = row["tflops"] / self._causal_rates[key]
        return shares


def with_dense(works: list[Work]) -> list[Work]:
    """Before each mix, also a causal mask over as many tokens, unless there is one."""
    known = {(work.heads, work.num_tokens) for work in works if work.mask == "causal"}
    ordered = []
    for work in works:
        if work.mask in MIXES and (work.heads, work.num_tokens) not in known:
            known.add((work.heads, work.num_tokens))
            ordered.append(make_work("causal", work.num_tokens, work.heads))
        ordered.append(work)
    return ordered


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--masks", nargs="+", choices=(*DENSE_MASKS, *MIXES), default=[*DENSE_MASKS, *MIXES])
    lengths = [16_384, 4_096, 65_536, 131_072]
    parser.add_argument("--lengths", nargs="+", type=int, default=lengths, help="of dense masks")
    parser.add_argument("--heads", nargs="+", default=["32/8", "32/32", "8/1"], help="query heads / KV heads")
    parser.add_argument("--mix-heads", nargs="+", default=["32/8"], help="likewise, of packed prompts and ring steps")
    parser.add_argument("--tunings", nargs="+", choices=TUNINGS, default=["default"])
    parser.add_argument("--rivals", nargs="*", choices=RIVALS, default=list(RIVALS))
    parser.add_argument("--samples", type=int, default=5)
    report.add_arguments(parser)
    args = parser.parse_args()

    rivals = {name: attention for name, attention in installed_rivals().items() if name in args.rivals}
    table = Table(rivals, args.tunings, args.samples)
    about = report.origin("prefill_kernel", None, args.commit)
    dense = [(mask, length) for length in args.lengths for mask in args.masks if mask in DENSE_MASKS]
    works = [make_work(mask, length, heads) for mask, length in dense for heads in args.heads]
    works += [make_work(mask, 0, heads) for mask in args.masks if mask in MIXES for heads in args.mix_heads]
    for work in with_dense(works):
        table.add(work)
        report.write(args.out, about, table.rows, num_devices=1)


if __name__ == "__main__":
    main()
