"""ring_attention on all GPUs of a machine, in TFLOP/s of visible pairs a GPU, beside the same attention on one.

    python -m benchmarks.ring_attention --out benchmarks/results/ring_attention_2xH200.json

Each prompt is causal and striped over the ranks. A row is timed as the slope between one and three calls of a program
that runs the op `repeats` times, each on the output of the one before. Rows say which collectives XLA runs beside an
attention kernel, and how far a few outputs are from float32. "one_gpu" is the kernel alone on the whole prompt, which
`of_one_gpu` compares the others with, and on one rank's share, whose pairs are those of one ring step. "apart" is the
kernel on the whole prompt on each GPU at the same time, whose rate is that of the slowest. "permute" is the n - 1
permutes of the ring alone. A name such as "ring+peer" asks XLA for the options of that name.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import report
from benchmarks.collective_schedule import read_schedule
from loongjax.pallas_kernels import prefill_attention
from loongjax.parallel import RING_COMPILER_OPTIONS, ring_attention

AXIS = "sp"
COMPILER_OPTIONS = {
    "": {},
    "peer": RING_COMPILER_OPTIONS,
    "copied": {"xla_gpu_enable_dynamic_slice_fusion": False},
    "unhidden": {"xla_gpu_disable_async_collectives": "COLLECTIVEPERMUTE,ALLGATHER"},
}
"""What follows a variant's "+": "peer" has permutes done by the copy engines, which takes no multiprocessors; "copied"
has keys and values copied out of their message before each step; "unhidden" has collectives run beside nothing.
"""
ASSUMED_FLOPS_PER_SECOND = 600e12
ASSUMED_LATENCY_S = 3e-4

State = tuple[jax.Array, ...]
"""q, k, v [n, T, heads, H], and the last output [n, T, N, H]"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One program to time."""

    length: int
    """Tokens of the prompt."""
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    ranks: int
    variant: str
    """ "one_gpu" (where `ranks` is 1), "apart", "permute", or a variant of `ring_attention`; then "+" options."""

    @property
    def shares(self) -> int:
        """Into which the prompt is cut."""
        return 1 if self.variant == "apart" else self.ranks

    @property
    def rows(self) -> int:
        """Tokens of one rank: T."""
        return self.length // self.shares

    @property
    def flops(self) -> int:
        """Of one rank's visible pairs: two products of 2 H operations each."""
        return self.length * (self.length + 1) // 2 * self.num_q_heads * 4 * self.head_dim // self.shares

    @property
    def block_bytes(self) -> int:
        """Keys and values of one rank, in bfloat16."""
        return 4 * self.rows * self.num_kv_heads * self.head_dim

    @property
    def repeats(self) -> int:
        """Repetitions that fill 20 ms."""
        return max(1, round(0.02 / (self.flops / ASSUMED_FLOPS_PER_SECOND + ASSUMED_LATENCY_S)))

    @property
    def checked_rows(self) -> list[int]:
        """Of each rank: the first, the middle and the last."""
        return [0, self.rows // 2, self.rows - 1]


def make_program(case: Case, mesh: Mesh, implementation: str | None) -> jax.stages.Wrapped:
    """Jitted: state and row_starts [n, T] to state; donates the state, and leaves q, k and v as they are."""
    variant = case.variant.partition("+")[0]

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, row_starts: jax.Array) -> jax.Array:
        if variant == "permute":
            block = jnp.stack([k, v])
            for _ in range(case.ranks - 1):
                block = jax.lax.ppermute(block, AXIS, [(i, (i + 1) % case.ranks) for i in range(case.ranks)])
            return jnp.zeros(q.shape, q.dtype) + block[0, :1, :1, :1] + block[1, :1, :1, :1]
        if variant == "apart":
            ends = jnp.arange(1, case.rows + 1, dtype=jnp.int32)
            return prefill_attention(q, k, v, row_starts, ends, implementation=implementation)[0]
        named = None if variant == "one_gpu" else variant
        return ring_attention(q, k, v, row_starts, axis_name=AXIS, variant=named, implementation=implementation)[0]

    def body(q: jax.Array, k: jax.Array, v: jax.Array, o: jax.Array, row_starts: jax.Array) -> State:
        def repeat(_: jax.Array, state: State) -> State:
            q, k, v, _ = state
            # All of it is carried: of rows that nobody sees the ring would not merge the partial outputs.
            o = attend(q, k, v, row_starts[0])
            # Each repetition waits for the one before, and none can be moved out of the loop; no bit changes.
            q, k, v = (x.at[0, 0, 0].add(o[0, 0, 0] * jnp.asarray(1e-30, o.dtype)) for x in (q, k, v))
            return q, k, v, o

        state = jax.lax.fori_loop(0, case.repeats, repeat, (q[0], k[0], v[0], o[0]))
        return tuple(x[None] for x in state)

    sharded = jax.shard_map(body, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS), check_vma=False)
    return jax.jit(sharded, donate_argnums=(0, 1, 2, 3))


def make_state(case: Case, mesh: Mesh) -> State:
    """Random on every rank."""
    heads = (case.num_q_heads, case.num_kv_heads, case.num_kv_heads, case.num_q_heads)
    shapes = [(case.ranks, case.rows, n, case.head_dim) for n in heads]
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return tuple(random_normal(mesh)(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True))


@functools.cache
def random_normal(mesh: Mesh) -> Callable[..., jax.Array]:
    return jax.jit(jax.random.normal, static_argnums=(1, 2), out_shardings=NamedSharding(mesh, P(AXIS)))


def expected_rows(case: Case, state: State) -> np.ndarray:
    """In float32, of the first query head's outputs, those of `checked_rows`: [n, 3, H]."""
    q, k, v = (np.asarray(x[:, :, 0].astype(jnp.float32)) for x in state[:3])
    # By prompt, in packed order: [prompts, length, H].
    k, v = (x.reshape(-1, case.shares, *x.shape[1:]).swapaxes(1, 2).reshape(-1, *x.shape[2:]) for x in (k, v))
    k, v = (x.reshape(-1, case.length, case.head_dim) for x in (k, v))
    outputs = np.zeros((case.ranks, len(case.checked_rows), case.head_dim), np.float32)
    for rank in range(case.ranks):
        prompt, share = divmod(rank, case.shares)
        for i, row in enumerate(case.checked_rows):
            end = row * case.shares + share + 1
            scores = k[prompt, :end] @ q[rank, row] * case.head_dim**-0.5
            weights = np.exp(scores - scores.max())
            outputs[rank, i] = weights @ v[prompt, :end] / weights.sum()
    return outputs


def measure(case: Case, mesh: Mesh, compiled: Any, samples: int) -> dict[str, float]:
    """Numbers of one row."""
    row_starts = jnp.zeros((case.ranks, case.rows), jnp.int32, device=NamedSharding(mesh, P(AXIS)))
    state = make_state(case, mesh)
    expected = None if case.variant.startswith("permute") else expected_rows(case, state)

    def seconds(num_calls: int) -> float:
        nonlocal state
        jax.block_until_ready(state)
        started = time.perf_counter()
        for _ in range(num_calls):
            state = compiled(*state, row_starts)
        jax.block_until_ready(state)
        return time.perf_counter() - started

    seconds(2)
    slopes = sorted((seconds(3) - seconds(1)) / (2 * case.repeats) for _ in range(samples))
    median = statistics.median(slopes)
    row = {"seconds": median, "shortest": slopes[0], "longest": slopes[-1], "repeats": case.repeats}
    if expected is None:
        return row | {"gb_per_second": (case.ranks - 1) * case.block_bytes / median / 1e9}
    outputs = state[3][:, jnp.asarray(case.checked_rows), 0]
    difference = np.abs(np.asarray(outputs.astype(jnp.float32)) - expected).max()
    return row | {"tflops_a_gpu": case.flops / median / 1e12, "difference": float(difference)}


def compile_all(cases: list[Case], implementation: str | None) -> dict[Case, Any]:
    """Compiled programs, or the exceptions instead; all at once, since most of the time goes into kernels."""

    def lower(case: Case) -> jax.stages.Lowered:
        mesh = mesh_of(case.ranks)
        shapes = (
            *jax.eval_shape(functools.partial(make_state, case, mesh)),
            jax.ShapeDtypeStruct((case.ranks, case.rows), jnp.int32),
        )
        arguments = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P(AXIS))) for x in shapes]
        return make_program(case, mesh, implementation).lower(*arguments)

    def compile_one(case: Case, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
        options: Any = COMPILER_OPTIONS[case.variant.partition("+")[2]]
        return lowered.compile(compiler_options=options)

    compiled: dict[Case, Any] = {}
    with concurrent.futures.ThreadPoolExecutor(len(cases)) as pool:
        for case in cases:
            try:
                compiled[case] = pool.submit(compile_one, case, lower(case))
            except Exception as error:
                compiled[case] = error
    return {
        case: (future.exception() or future.result()) if isinstance(future, concurrent.futures.Future) else future
        for case, future in compiled.items()
    }


def measure_all(cases: list[Case], implementation: str | None, samples: int) -> Iterator[dict[str, object]]:
    """One row a case; a case that fails is printed, and does not stop the others."""
    one_gpu: float | None = None
    for case, compiled in compile_all(cases, implementation).items():
        row: dict[str, object] = {**dataclasses.asdict(case), "block_bytes": case.block_bytes}
        try:
            if isinstance(compiled, BaseException):
                raise compiled
            row |= dataclasses.asdict(read_schedule(compiled.as_text()))
            row["temporary_bytes"] = compiled.memory_analysis().temp_size_in_bytes
            row |= measure(case, mesh_of(case.ranks), compiled, samples)
        except Exception as error:
            traceback.print_exception(error)
            row["error"] = repr(error)[:500]
        rate = row.get("tflops_a_gpu")
        if case.variant == "one_gpu" and one_gpu is None and isinstance(rate, float):
            one_gpu = rate
        elif one_gpu is not None and isinstance(rate, float):
            row["of_one_gpu"] = rate / one_gpu
        print(json.dumps({key: float(f"{x:.4g}") if isinstance(x, float) else x for key, x in row.items()}), flush=True)
        yield row


@functools.cache
def mesh_of(ranks: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:ranks]), (AXIS,))


def cases_of(length: int, heads: str, ranks: int, head_dim: int, variants: list[str]) -> list[Case]:
    """The whole prompt and a rank's share of it on one GPU, then the variants."""
    num_q_heads, num_kv_heads = map(int, heads.split("/"))
    case = Case(
        length=length,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        ranks=1,
        variant="one_gpu",
    )
    share = dataclasses.replace(case, length=length // ranks)
    return [case, share, *(dataclasses.replace(case, ranks=ranks, variant=variant) for variant in variants)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=int, default=[131_072, 16_384, 4_096, 1_024])
    parser.add_argument("--heads", nargs="+", default=["32/8", "32/32", "8/1"], help="query heads / KV heads")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--ranks", nargs="+", type=int, help="GPUs of a ring; all that are here if left out")
    parser.add_argument(
        "--variants", nargs="+", default=["apart", "ring", "ring+peer", "all_gather", "loop", "permute"]
    )
    parser.add_argument("--implementation", help="of prefill_attention; mosaic_gpu on a GPU if left out")
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--limit-s", type=float, default=400, help="begin no length after so many seconds")
    report.add_arguments(parser)
    args = parser.parse_args(argv)

    device = jax.devices()[0]
    implementation = args.implementation or ("mosaic_gpu" if device.platform == "gpu" else None)
    started = time.perf_counter()
    about = report.origin("ring_attention", argv, args.commit)
    rows: list[dict[str, Any]] = []
    for length in args.lengths:
        for heads in args.heads:
            for ranks in args.ranks or [len(jax.devices())]:
                if time.perf_counter() - started > args.limit_s:
                    print(f"left out: {length} tokens, {heads} heads, {ranks} ranks", file=sys.stderr)
                    continue
                cases = cases_of(length, heads, ranks, args.head_dim, args.variants)
                for row in measure_all(cases, implementation, args.samples):
                    rows.append(row)
                    report.write(args.out, about, rows)


if __name__ == "__main__":
    main()
