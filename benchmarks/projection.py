"""Speed of the products of few rows with a model's matrices beside XLA's, as shares of a device-to-device copy's rate.

    python -m benchmarks.projection --out benchmarks/results/projection.json
    python -m benchmarks.projection --tune --tokens 1

Times are kernels' own, traced. Every repetition has rows and matrices of its own, at least 500 MB of them, so that
none is found in the L2. "xla" is what the model does without the op: an einsum for each matrix, and for gate and up the
activation after. Rates count the bytes of the matrices.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import report
from loongjax.pallas_kernels.projection.reference import reference_project, reference_project_gated
from loongjax.pallas_kernels.projection.triton_variant import (
    ProjectionTuning,
    default_tuning,
    triton_project,
    triton_project_gated,
)
from loongjax_profiling.kernels.device_trace import device_times
from loongjax_profiling.kernels.timing import copy_bytes_per_second

LEAST_BYTES = 5e8
LEAST_REPETITIONS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """The matrices of one launch."""

    in_dim: int
    out_dims: tuple[int, ...]
    is_gated: bool = False

    @property
    def num_bytes(self) -> int:
        """Of the matrices in bfloat16."""
        return 2 * self.in_dim * sum(self.out_dims)

    @property
    def repetitions(self) -> int:
        return max(LEAST_REPETITIONS, math.ceil(LEAST_BYTES / self.num_bytes))


CASES = {
    "7B": {
        "q, k, v": Case(in_dim=4096, out_dims=(4096, 4096, 4096)),
        "o": Case(in_dim=4096, out_dims=(4096,)),
        "gate, up": Case(in_dim=4096, out_dims=(11008, 11008), is_gated=True),
        "down": Case(in_dim=11008, out_dims=(4096,)),
        "head": Case(in_dim=4096, out_dims=(32000,)),
    },
    "8B": {
        "q, k, v": Case(in_dim=4096, out_dims=(4096, 1024, 1024)),
        "o": Case(in_dim=4096, out_dims=(4096,)),
        "gate, up": Case(in_dim=4096, out_dims=(14336, 14336), is_gated=True),
        "down": Case(in_dim=14336, out_dims=(4096,)),
        "head": Case(in_dim=4096, out_dims=(128256,)),
    },
}

Blocks = tuple[int, int, int, int, int | None]
"""block_o, block_i, num_warps, stages, programs_per_processor"""

PLAIN: tuple[Blocks, ...] = (
    (4, 2048, 8, 1, None),
    (2, 2048, 4, 1, None),
    (4, 1024, 4, 1, None),
    (2, 1024, 4, 1, None),
    (8, 512, 4, 1, None),
    (8, 1024, 4, 1, None),
    (4, 512, 2, 1, None),
    (2, 4096, 8, 1, None),
    (4, 1024, 4, 3, None),
    (8, 512, 4, 4, None),
    (4, 1024, 4, 1, 7),
    (4, 2048, 8, 1, 4),
    (4, 1024, 4, 3, 5),
)
"""For one token."""
TENSOR_CORES: tuple[Blocks, ...] = (
    (16, 256, 2, 4, 3),
    (16, 256, 2, 4, None),
    (16, 256, 1, 4, None),
    (16, 256, 1, 4, 4),
    (16, 512, 4, 3, None),
    (16, 512, 2, 4, 2),
    (32, 128, 2, 4, None),
    (32, 256, 4, 4, 2),
    (32, 256, 4, 4, None),
    (32, 256, 4, 4, 1),
    (64, 128, 4, 4, 2),
)


def tunings(num_tokens: int) -> Iterator[ProjectionTuning]:
    """What is compared for so many tokens."""
    for uses_tensor_cores, candidates in ((False, PLAIN), (True, TENSOR_CORES)):
        if num_tokens > 1 and not uses_tensor_cores:
            continue
        for block_o, block_i, num_warps, stages, programs in candidates:
            yield ProjectionTuning(
                block_o=block_o,
                block_i=block_i,
                num_warps=num_warps,
                stages=stages,
                programs_per_processor=programs,
                uses_tensor_cores=uses_tensor_cores,
            )


Weights = tuple[jax.Array, ...]
Op = Callable[[jax.Array, Weights], Any]


def make_op(case: Case, tuning: ProjectionTuning | None) -> Op:
    """The kernel with this tuning; XLA's products for None."""
    if tuning is None:
        if case.is_gated:
            return lambda x, weights: reference_project_gated(x, *weights)
        return lambda x, weights: reference_project(x, weights, out_dtype=x.dtype)
    if case.is_gated:
        return lambda x, weights: triton_project_gated(x, *weights, tuning=tuning)
    return lambda x, weights: triton_project(x, weights, out_dtype=x.dtype, tuning=tuning)


@functools.partial(jax.jit, static_argnums=(1, 2))
def random_matrix(key: jax.Array, rows: int, columns: int) -> jax.Array:
    return jax.random.normal(key, (rows, columns), jnp.bfloat16)


def make_weights(case: Case) -> list[Weights]:
    """For every repetition."""
    keys = jax.random.split(jax.random.key(0), (case.repetitions, len(case.out_dims)))
    return [
        tuple(random_matrix(keys[i, j], rows, case.in_dim) for j, rows in enumerate(case.out_dims))
        for i in range(case.repetitions)
    ]


def measure(case: Case, weights: list[Weights], num_tokens: int, op: Op) -> dict[str, Any]:
    """Microseconds of one repetition."""
    xs = [random_matrix(jax.random.key(1 + i), num_tokens, case.in_dim) for i in range(len(weights))]

    def repeat(num: int) -> Callable[[], Any]:
        assert num == len(weights)
        call = jax.jit(lambda xs, weights: [op(x, matrices) for x, matrices in zip(xs, weights, strict=True)])
        return lambda: call(xs, weights)

    times = device_times(repeat, len(weights))
    seconds = sum(times.kernel_s.values())
    return {
        "us": round(seconds * 1e6, 2),
        "period_us": round(times.period_s * 1e6, 2),
        "bytes_per_second": round(case.num_bytes / seconds),
        "kernels_us": {name: round(seconds * 1e6, 2) for name, seconds in times.kernel_s.items()},
    }


def describe(row: dict[str, Any]) -> str:
    tuning = row["tuning"] and list(row["tuning"].values())
    head = f"{row['model']} {row['work']:9} {row['tokens']:3} tokens {'xla' if tuning is None else tuning!s:36}"
    if "error" in row:
        return f"{head} {row['error']}"
    rate = f"{row['bytes_per_second'] / 1e12:6.3f} TB/s {row['of_copy']:6.1%}"
    return f"{head} {row['us']:8.2f} us {rate}, period {row['period_us']:8.2f}, {len(row['kernels_us'])} kernels"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--work", nargs="+", help="such as 'gate, up'; all by default")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 2, 4, 16, 32])
    parser.add_argument("--tune", action="store_true", help="compare ways to cut the work instead of the default one")
    parser.add_argument("--seconds", type=float, default=90.0, help="no row is begun after so many")
    report.add_arguments(parser)
    args = parser.parse_args()
    about = report.origin("projection", None, args.commit)
    started = time.monotonic()
    copy_rate = copy_bytes_per_second()
    print(f"copy: {copy_rate / 1e12:.3f} TB/s", flush=True)
    rows = []
    for model in args.models:
        for work, case in CASES[model].items():
            if args.work and work not in args.work:
                continue
            weights = make_weights(case)
            for num_tokens in args.tokens:
                candidates = tunings(num_tokens) if args.tune else [default_tuning(num_tokens, is_gated=case.is_gated)]
                for tuning in [None, *candidates]:
                    if time.monotonic() - started > args.seconds:
                        continue
                    row: dict[str, Any] = {"model": model, "work": work, "tokens": num_tokens}
                    row["tuning"] = tuning and dataclasses.asdict(tuning)
                    try:
                        row |= measure(case, weights, num_tokens, make_op(case, tuning))
                        row["of_copy"] = round(row["bytes_per_second"] / copy_rate, 4)
                    except Exception as error:  # the others stand without it
                        traceback.print_exc()
                        row["error"] = repr(error)[:300]
                    rows.append(row)
                    print(describe(row), flush=True)
    report.write(args.out, about | {"copy_bytes_per_second": round(copy_rate)}, rows)


if __name__ == "__main__":
    main()
