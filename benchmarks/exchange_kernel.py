"""Speed of the exchange kernels beside XLA's collectives, on all GPUs that are here.

    python -m benchmarks.exchange_kernel --out benchmarks/results/exchange_kernel.json

One jitted program does 64 exchanges, one after another, as a decode step does, with one multiplication between two.
Times of one exchange are slopes between programs of 64 and 128, by the wall clock over many calls. "multiply" is the
program without the exchanges, so what an exchange adds is the difference. In the multi-master rows, elementwise
operations stand for attention. A name such as "triton 2048/8" names a tuning: the least bytes of a chunk, and warps.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import pathlib
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

from loongjax.pallas_kernels.exchange import PeerMemory
from loongjax.pallas_kernels.exchange.group import group_of
from loongjax.pallas_kernels.exchange.launch import (
    ExchangeTuning,
    triton_all_gather,
    triton_all_reduce,
    triton_exchange_and_merge,
)
from loongjax.pallas_kernels.exchange.reference import reference_exchange_and_merge
from loongjax_profiling.kernels.mesh import attend_stand_in, by_reduce_scatter
from loongjax_profiling.provenance import checked_out_commit

AXIS = "tp"
EXCHANGES = (64, 128)
"""Of the two programs whose times are subtracted."""
HIDDEN_SIZE, NUM_HEADS, HEAD_DIM = 4096, 32, 128
TUNINGS = ("512/2", "512/4", "1024/4", "2048/4", "2048/8", "4096/8", "8192/16")

type Step = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(peers, x, factor) -> x"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One program to time."""

    op: str
    """ "all_reduce" or "multi_master"."""
    rows: int
    """Tokens of the all-reduce, or requests of one master."""
    variant: str
    """A key of `VARIANTS[op]`, perhaps followed by a tuning."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one rank's operand, bfloat16."""
        return (self.rows, HIDDEN_SIZE) if self.op == "all_reduce" else (self.rows, NUM_HEADS, HEAD_DIM)

    @property
    def tuning(self) -> ExchangeTuning:
        tuned = self.variant.partition(" ")[2]
        if not tuned:
            return ExchangeTuning()
        min_chunk_bytes, num_warps = map(int, tuned.split("/"))
        return ExchangeTuning(min_chunk_bytes=min_chunk_bytes, num_warps=num_warps)

    @property
    def step(self) -> Step:
        """One exchange and one multiplication."""
        return functools.partial(VARIANTS[self.op][self.variant.partition(" ")[0]], self.tuning)


def multiply(_: ExchangeTuning, peers: jax.Array, x: jax.Array, factor: jax.Array) -> jax.Array:
    return x * factor


def psum(_: ExchangeTuning, peers: jax.Array, x: jax.Array, factor: jax.Array) -> jax.Array:
    return jax.lax.psum(x * factor, AXIS)


def reduce_by_kernel(tuning: ExchangeTuning, peers: jax.Array, x: jax.Array, factor: jax.Array) -> jax.Array:
    return triton_all_reduce(x * factor, group_of(peers, AXIS), tuning=tuning)


def multiply_alone(_: ExchangeTuning, peers: jax.Array, q: jax.Array, factor: jax.Array) -> jax.Array:
    o, lse = attend_stand_in(jnp.broadcast_to(q, (jax.lax.axis_size(AXIS), *q.shape)), factor)
    return (o * lse[..., None]).mean(axis=0).astype(q.dtype)


def all_to_all(_: ExchangeTuning, peers: jax.Array, q: jax.Array, factor: jax.Array) -> jax.Array:
    o, lse = attend_stand_in(jax.lax.all_gather(q, AXIS), factor)
    return reference_exchange_and_merge(o, lse, AXIS, q.dtype)[0]


def psum_scatter(_: ExchangeTuning, peers: jax.Array, q: jax.Array, factor: jax.Array) -> jax.Array:
    return by_reduce_scatter(q, factor, axis_name=AXIS)


def exchange_by_kernels(tuning: ExchangeTuning, peers: jax.Array, q: jax.Array, factor: jax.Array) -> jax.Array:
    group = group_of(peers, AXIS)
    o, lse = attend_stand_in(triton_all_gather(q, group, tuning=tuning), factor)
    return triton_exchange_and_merge(o, lse, group, out_dtype=q.dtype, tuning=tuning)[0]


VARIANTS = {
    "all_reduce": {"multiply": multiply, "psum": psum, "triton": reduce_by_kernel},
    "multi_master": {
        "multiply": multiply_alone,
        "all_to_all": all_to_all,
        "psum_scatter": psum_scatter,
        "triton": exchange_by_kernels,
    },
}


def make_program(case: Case, mesh: Mesh, num_exchanges: int) -> jax.stages.Wrapped:
    """Jitted: (peers, x [n, ...], factors [n, 1]) to x."""

    def body(peers: jax.Array, x: jax.Array, factor: jax.Array) -> jax.Array:
        x = x[0]
        for _ in range(num_exchanges):
            # Multiplications with nothing between them would become one.
            x = jax.lax.optimization_barrier(case.step(peers, x, factor[0]))
        return x[None]

    specs = P(), P(AXIS), P(AXIS)
    return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=P(AXIS), check_vma=False))


def operands(case: Case, mesh: Mesh) -> tuple[jax.Array, jax.Array]:
    """Random x, and another factor on each rank, such that sums stay as large as they are."""
    n = mesh.devices.size
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, *case.shape)).astype(jnp.bfloat16)
    factors = rng.uniform(0.8, 1.2, (n, *(1 for _ in case.shape)))
    factors = (factors / factors.sum() if case.op == "all_reduce" else factors).astype(jnp.bfloat16)
    sharding = NamedSharding(mesh, P(AXIS))
    return jax.device_put(x, sharding), jax.device_put(factors, sharding)


def compile_all(cases: list[Case], mesh: Mesh, table: jax.Array) -> dict[Case, list[Any]]:
    """Compiled programs of 1, 64 and 128 exchanges, or the exception instead of one; all at once."""

    def lower(case: Case, num_exchanges: int) -> jax.stages.Lowered:
        return make_program(case, mesh, num_exchanges).lower(table, *operands(case, mesh))

    compiled: dict[Case, list[Any]] = {}
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        for case in cases:
            try:
                compiled[case] = [pool.submit(lower(case, num).compile) for num in (1, *EXCHANGES)]
            except Exception as error:
                compiled[case] = [error]
        return {case: [_outcome(program) for program in programs] for case, programs in compiled.items()}


def _outcome(program: Any) -> Any:
    return (program.exception() or program.result()) if isinstance(program, concurrent.futures.Future) else program


def measure(programs: list[Any], arguments: tuple[jax.Array, ...], samples: int, num_calls: int) -> dict[str, float]:
    """Numbers of one row."""
    table, x, factors = arguments

    def seconds(program: Any) -> float:
        y = jax.block_until_ready(program(table, x, factors))
        started = time.perf_counter()
        for _ in range(num_calls):
            y = program(table, y, factors)
        jax.block_until_ready(y)
        return (time.perf_counter() - started) / num_calls

    short, long = programs[1:]
    for program in (short, long, short, long):
        seconds(program)
    times = [(seconds(short), seconds(long)) for _ in range(samples)]
    slopes = sorted((b - a) / (EXCHANGES[1] - EXCHANGES[0]) for a, b in times)
    return {
        "us": 1e6 * statistics.median(slopes),
        "least_us": 1e6 * slopes[0],
        "most_us": 1e6 * slopes[-1],
        "us_in_64": 1e6 * statistics.median(a for a, _ in times) / EXCHANGES[0],
    }


def measure_all(
    cases: list[Case], mesh: Mesh, memory: PeerMemory, samples: int, num_calls: int
) -> Iterator[dict[str, object]]:
    """One row a case; a case that fails is printed, and does not stop the others."""
    table = memory.table(mesh)
    truths: dict[tuple[str, int], np.ndarray] = {}
    for case, programs in compile_all(cases, mesh, table).items():
        row: dict[str, object] = dataclasses.asdict(case)
        try:
            for program in programs:
                if isinstance(program, BaseException):
                    raise program
            arguments = (table, *operands(case, mesh))
            row["fusions_in_64"] = programs[1].as_text().count(" fusion(")
            row |= measure(programs, arguments, samples, num_calls)
            once = np.asarray(programs[0](*arguments).astype(jnp.float32))
            if case.variant != "multiply":
                truth = truths.setdefault((case.op, case.rows), once)
                row["difference"] = float(np.abs(once - truth).max())
            memory.check()
        except Exception as error:
            traceback.print_exception(error)
            row["error"] = repr(error)[:500]
        print(json.dumps({key: float(f"{x:.4g}") if isinstance(x, float) else x for key, x in row.items()}), flush=True)
        yield row


def cases_of(tokens: list[int], requests: list[int], tuned: bool) -> list[Case]:
    kernels = ["triton", *(f"triton {tuning}" for tuning in TUNINGS if tuned)]
    reduced = [
        Case(op="all_reduce", rows=rows, variant=variant)
        for rows in tokens
        for variant in ("multiply", "psum", *kernels)
    ]
    exchanged = [
        Case(op="multi_master", rows=rows, variant=variant)
        for rows in requests
        for variant in ("multiply", "all_to_all", "psum_scatter", *kernels)
    ]
    return reduced + exchanged


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="*", type=int, default=[1, 32, 128, 512], help="of the all-reduces")
    parser.add_argument("--requests", nargs="*", type=int, default=[1, 32], help="of a master")
    parser.add_argument("--ranks", type=int, help="GPUs; all that are here if left out")
    parser.add_argument("--tune", action="store_true", help="measure other tunings too")
    parser.add_argument("--samples", type=int, default=7)
    parser.add_argument("--calls", type=int, default=20, help="of one program in a row")
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--commit", default=checked_out_commit(), help="of this code")
    args = parser.parse_args(argv)

    devices = jax.devices()[: args.ranks]
    memory = PeerMemory(devices)
    result: dict[str, Any] = {
        "command": "python -m benchmarks.exchange_kernel " + " ".join(sys.argv[1:] if argv is None else argv),
        "hardware": f"{len(devices)} x {devices[0].device_kind}",
        "jax": jax.__version__,
        "commit": args.commit,
        "rows": [],
    }
    cases = cases_of(args.tokens, args.requests, args.tune)
    for row in measure_all(cases, Mesh(np.array(devices), (AXIS,)), memory, args.samples, args.calls):
        result["rows"].append(row)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
