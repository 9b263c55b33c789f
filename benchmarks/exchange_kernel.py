"""Tunings of the exchange kernels, on all GPUs that are here.

    python -m benchmarks.exchange_kernel --out benchmarks/results/exchange_kernel_tunings_2xH200.json

The work and the method are those of `loongjax profile kernels --ops exchange`, which has the kernels as they are tuned
beside XLA's collectives. A name such as "2048/8" is a tuning: the least bytes of a chunk, and warps.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import json
import traceback
from typing import Any

import jax

from benchmarks import report
from loongjax.pallas_kernels.exchange.api import Peers
from loongjax.pallas_kernels.exchange.group import group_of
from loongjax.pallas_kernels.exchange.launch import (
    ExchangeTuning,
    triton_all_gather,
    triton_all_reduce,
    triton_exchange_and_merge,
)
from loongjax_profiling.kernels.device_trace import device_times
from loongjax_profiling.kernels.mesh import AXIS, attend_stand_in, exchanges_of, peer_memory, repeat_exchange

REPETITIONS = 64
TUNINGS = ("512/2", "512/4", "1024/4", "2048/2", "2048/4", "2048/8", "4096/8", "8192/16")


def tuning_of(name: str) -> ExchangeTuning:
    min_chunk_bytes, num_warps = map(int, name.split("/"))
    return ExchangeTuning(min_chunk_bytes=min_chunk_bytes, num_warps=num_warps)


def reduce(tuning: ExchangeTuning, peers: Peers, x: jax.Array, factor: jax.Array) -> jax.Array:
    assert peers is not None
    return triton_all_reduce(x * factor, group_of(peers, AXIS), tuning=tuning)


def gather_and_merge(tuning: ExchangeTuning, peers: jax.Array, q: jax.Array, factor: jax.Array) -> jax.Array:
    assert peers is not None
    group = group_of(peers, AXIS)
    o, lse = attend_stand_in(triton_all_gather(q, group, tuning=tuning), factor)
    return triton_exchange_and_merge(o, lse, group, out_dtype=q.dtype, tuning=tuning)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tunings", nargs="+", default=TUNINGS)
    report.add_arguments(parser)
    args = parser.parse_args()

    devices = jax.devices()
    about = report.origin("exchange_kernel", None, args.commit)
    rows: list[dict[str, Any]] = []
    steps = {"all_reduce": reduce, "multi_master": gather_and_merge}
    for exchange in exchanges_of(len(devices)):
        repeats = {
            name: repeat_exchange(
                exchange, functools.partial(steps[exchange.op], tuning_of(name)), len(devices), has_peers=True
            )
            for name in args.tunings
        }
        with concurrent.futures.ThreadPoolExecutor() as pool:
            compiled = {name: pool.submit(repeat, REPETITIONS) for name, repeat in repeats.items()}
        for name, repeat in repeats.items():
            row: dict[str, Any] = {"op": exchange.op, "work": exchange.work, "tuning": name}
            try:
                compiled[name].result()
                times = device_times(repeat, REPETITIONS)
                row["us"] = round(1e6 * times.period_s, 2)
                row["kernels_us"] = {kernel: round(1e6 * seconds, 2) for kernel, seconds in times.kernel_s.items()}
                peer_memory().check()
            except Exception as error:
                traceback.print_exception(error)
                row["error"] = repr(error)[:500]
            print(json.dumps(row), flush=True)
            rows.append(row)
    report.write(args.out, about, rows)


if __name__ == "__main__":
    main()
