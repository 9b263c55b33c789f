"""Speed of extend attention beside prefill attention over the same pairs, on random data.

python -m benchmarks.extend_kernel --out benchmarks/results/extend_kernel_1xH200.json
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import report
from loongjax.pallas_kernels.extend_attention.by_length import extend_attention_by_length
from loongjax.pallas_kernels.extend_attention.mosaic_gpu import mosaic_gpu_extend_attention
from loongjax.pallas_kernels.extend_attention.triton_variant import TUNING, triton_extend_attention
from loongjax.pallas_kernels.paged_triton.launch import PagedTuning
from loongjax.pallas_kernels.prefill_attention.mosaic_gpu import mosaic_gpu_prefill_attention
from loongjax_profiling.kernels.timing import SlopeTimer, sample_in_turn

HEAD_DIM = 128
SAMPLES = 9
TUNINGS = [
    TUNING,
    PagedTuning(block=64, stages=2, num_warps=8, programs_per_processor=2),
    PagedTuning(block=128, stages=2, num_warps=8, programs_per_processor=1),
]
Attend = Callable[[Any, jax.Array], jax.Array]
"""The op, given its keys and values and the queries."""
Op = Callable[..., tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Requests that are extended together."""

    new: tuple[int, ...]
    """Query tokens of each."""
    keys: tuple[int, ...]
    """Before them; multiples of 64."""
    heads: tuple[int, int] = (32, 8)

    @property
    def flops(self) -> float:
        pairs = sum(num_new * num_keys for num_new, num_keys in zip(self.new, self.keys, strict=True))
        return 4.0 * pairs * self.heads[0] * HEAD_DIM


def one(num_new: int, num_keys: int, heads: tuple[int, int] = (32, 8)) -> Case:
    """A request by itself."""
    return Case(new=(num_new,), keys=(num_keys,), heads=heads)


def beside_decodes(num_new: int, num_keys: int, num_decodes: int) -> Case:
    """A chunk beside requests of one token, with as many keys each."""
    return Case(new=(num_new, *(1,) * num_decodes), keys=(num_keys,) * (1 + num_decodes))


CASES = {
    "many rows": [one(512, 32_768), one(512, 131_072), one(4, 131_072), one(512, 32_768, (32, 32))],
    "few rows": [one(num_new, 200_000) for num_new in (32, 64, 128, 256, 512)],
    "mixed": [
        *(beside_decodes(num_new, 10_048, 16) for num_new in (128, 512, 2048)),
        beside_decodes(512, 10_048, 64),
        Case(new=(512,) * 4, keys=(10_048,) * 4),
        Case(new=(8,) * 16, keys=(10_048,) * 16),
        Case(new=(32,) * 4, keys=(49_984,) * 4),
    ],
}


@functools.cache
def random_normal(seed: int, *shape: int) -> jax.Array:
    """One array for all programs that want the same."""
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def extend(case: Case, page_size: int, variant: Op) -> tuple[Attend, jax.Array]:
    """The op over randomly permuted tables, given its pool."""
    num_pages = sum(case.keys) // page_size
    pool = random_normal(0, 1, 2, num_pages, page_size, case.heads[1], HEAD_DIM)
    table = jnp.asarray(np.random.default_rng(0).permutation(num_pages), jnp.int32)
    cu_q_lens = jnp.asarray(np.cumsum([0, *case.new]), jnp.int32)
    kv_lens = np.array(case.keys)
    tables = (
        table,
        jnp.asarray((np.cumsum(kv_lens) - kv_lens) // page_size, jnp.int32),
        jnp.asarray(kv_lens, jnp.int32),
    )

    def attend(pool: jax.Array, q: jax.Array) -> jax.Array:
        settings = {"sm_scale": HEAD_DIM**-0.5, "out_dtype": np.dtype(q.dtype)}
        return variant(q, cu_q_lens, pool, jnp.int32(0), *tables, **settings)[0]

    return attend, pool


def prefill(case: Case) -> tuple[Attend, tuple[jax.Array, jax.Array]]:
    """The same pairs by the prefill kernel, over keys and values that lie in order."""
    k, v = (random_normal(seed, sum(case.keys), case.heads[1], HEAD_DIM) for seed in (2, 3))
    ends = np.repeat(np.cumsum(case.keys), case.new)
    starts = ends - np.repeat(case.keys, case.new)
    k_start, k_end = jnp.asarray(starts, jnp.int32), jnp.asarray(ends, jnp.int32)

    def attend(kv: tuple[jax.Array, jax.Array], q: jax.Array) -> jax.Array:
        settings = {"sm_scale": HEAD_DIM**-0.5, "out_dtype": np.dtype(q.dtype)}
        return mosaic_gpu_prefill_attention(q, *kv, k_start, k_end, **settings)[0]

    return attend, (k, v)


def timer(case: Case, attend: Attend, keys: Any) -> SlopeTimer:
    """Of one call, each on the output of the one before."""
    q = random_normal(1, sum(case.new), case.heads[0], HEAD_DIM)

    def repeat(num: int) -> Callable[[], jax.Array]:
        run = jax.jit(lambda keys, q: jax.lax.fori_loop(0, num, lambda _, q: attend(keys, q), q))
        return lambda: run(keys, q)

    return SlopeTimer(repeat, max(4, round(0.01 / (case.flops / 400e12))))


def variants_of(
    case: Case, page_sizes: Sequence[int], tunings: Sequence[PagedTuning]
) -> dict[str, Callable[[], tuple[Attend, Any]]]:
    """What is timed, by name; what makes it may fail."""
    variants: dict[str, Callable[[], tuple[Attend, Any]]] = {"prefill_attention": lambda: prefill(case)}
    for page_size in page_sizes:
        ops: dict[str, Op] = {"mosaic_gpu": mosaic_gpu_extend_attention}
        for tuning in tunings:
            name = f"triton {dataclasses.astuple(tuning)}"
            ops[name] = functools.partial(triton_extend_attention, tuning=tuning)
        if len(case.new) > 1:
            ops["by_length"] = extend_attention_by_length
        for name, op in ops.items():
            variants[f"{name}, page size {page_size}"] = functools.partial(extend, case, page_size, op)
    return variants


def compare(
    cases: Sequence[Case], page_sizes: Sequence[int], tunings: Sequence[PagedTuning]
) -> Iterator[list[dict[str, Any]]]:
    """For each case, one row a variant, timed in turn; one that fails says why, and does not stop the others."""
    variants = [variants_of(case, page_sizes, tunings) for case in cases]
    # Most of the time goes into compiling.
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        made = [
            {name: pool.submit(lambda case=case, make=make: timer(case, *make())) for name, make in named.items()}
            for case, named in zip(cases, variants, strict=True)
        ]
    for case, named in zip(cases, made, strict=True):
        rows: dict[str, dict[str, Any]] = {}
        timers: dict[str, SlopeTimer] = {}
        for name, future in named.items():
            rows[name] = {**dataclasses.asdict(case), "variant": name}
            try:
                timers[name] = future.result()
            except Exception as error:
                traceback.print_exc()
                rows[name]["error"] = repr(error)[:300]
        sample_in_turn(list(timers.values()), SAMPLES)
        for name, timed in timers.items():
            rows[name] |= {"us": round(timed.seconds * 1e6, 1), "tflops": round(case.flops / timed.seconds / 1e12, 1)}
            if "prefill_attention" in timers:
                rows[name]["of_prefill"] = round(timers["prefill_attention"].seconds / timed.seconds, 4)
        yield list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="every tuning of the Triton variant")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--page-sizes", nargs="+", type=int, default=[1, 16, 64])
    report.add_arguments(parser)
    args = parser.parse_args()
    about = report.origin("extend_kernel", None, args.commit)
    measured: list[dict[str, Any]] = []
    cases = list(itertools.chain.from_iterable(CASES[name] for name in args.cases))
    for rows in compare(cases, args.page_sizes, TUNINGS if args.tune else TUNINGS[:1]):
        measured += rows
        print(*map(json.dumps, rows), sep="\n", flush=True)
        report.write(args.out, about, measured)


if __name__ == "__main__":
    main()
