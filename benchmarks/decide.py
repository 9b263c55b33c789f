"""How long the ESP policy takes to decide, on clusters as they look while serving.

    python -m benchmarks.decide --out benchmarks/results/decide.json

Each case is a cluster with so many instances, running and waiting requests. Requests' lengths are log-normal, their
keys on one instance each. A sample is one answer to a view of its own, in wall-clock time of this process. The views
differ in what the engine asks about: one decode group that is idle while the others are in flight (a step has ended,
or is rehearsed), some instances vacant, or everything idle. "picked" is how many waiting requests an answer may
prefill together, all of which go through the batching of equation 5.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import platform
import sys
import time
from typing import Any

import numpy as np
from tqdm import tqdm

from loongjax.core.cluster import ClusterShape, Group
from loongjax.core.plan import Decode, SubBatch
from loongjax.costmodel.model_shape import ModelShape
from loongjax.costmodel.roofline import DeviceRates, RooflineModel
from loongjax.costmodel.work import DecodeWork
from loongjax.scheduler.esp.config import EspConfig
from loongjax.scheduler.esp.policy import EspPolicy
from loongjax.scheduler.view import ClusterView, FlightView, InstanceView, RunningView, WaitingView
from loongjax_profiling.provenance import checked_out_commit

LLAMA3_8B = ModelShape(
    hidden_size=4096,
    num_layers=32,
    num_q_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=14336,
    vocab_size=128256,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A kind of cluster."""

    num_instances: int
    num_running: int
    num_waiting: int
    max_picked: int = 64
    num_vacant: int = 0
    """Instances without keys, all idle."""
    num_idle: int = 1
    """Instances with keys that are idle; the others decode."""


CASES = {
    "a step ends, nobody waits": Case(num_instances=8, num_running=256, num_waiting=0),
    "a step ends": Case(num_instances=8, num_running=256, num_waiting=1000),
    "an instance is vacant": Case(num_instances=8, num_running=256, num_waiting=1000, num_vacant=1),
    "half are vacant": Case(num_instances=8, num_running=256, num_waiting=1000, num_vacant=4),
    "all is idle": Case(num_instances=8, num_running=256, num_waiting=1000, num_vacant=4, num_idle=4),
    "half are vacant, 256 picked": Case(
        num_instances=8, num_running=256, num_waiting=1000, num_vacant=4, max_picked=256
    ),
    "64 instances": Case(num_instances=64, num_running=2048, num_waiting=10_000, num_vacant=4),
    "1,024 instances": Case(num_instances=1024, num_running=32_768, num_waiting=100_000, num_vacant=4),
}


def make_view(case: Case, random: np.random.Generator) -> ClusterView:
    """A cluster of this kind."""
    shape = ClusterShape(num_instances=case.num_instances, num_pages=8192, page_size=64)
    homes = np.arange(case.num_vacant, case.num_instances)
    running = []
    used = [0] * case.num_instances
    for order in range(case.num_running):
        instance = int(homes[order % len(homes)])
        num_prompt_tokens = min(int(random.lognormal(7.5, 1.0)) + 1, 8192)
        num_outputs = int(random.integers(1, 500))
        num_tokens = num_prompt_tokens + num_outputs - 1
        used[instance] += shape.num_pages_for(num_tokens)
        running.append(
            RunningView(
                request_id=f"r{order}",
                order=order,
                num_tokens=num_tokens,
                max_total_tokens=num_prompt_tokens + 1000,
                kv=((instance, num_tokens),),
                is_in_flight=instance >= case.num_vacant + case.num_idle,
                num_output_tokens=num_outputs,
                arrival_s=0.0,
                first_token_s=1.0,
            )
        )
    waiting = []
    for order in range(case.num_running, case.num_running + case.num_waiting):
        num_tokens = min(int(random.lognormal(7.5, 1.5)) + 1, 200_000)
        waiting.append(
            WaitingView(
                request_id=f"w{order}",
                order=order,
                num_tokens=num_tokens,
                max_total_tokens=num_tokens + 1000,
                keeps_kv=True,
                arrival_s=5.0,
            )
        )
    return ClusterView(
        shape=shape,
        instances=tuple(
            InstanceView(
                instance=instance,
                num_free_pages=shape.num_pages - used[instance],
                is_busy=instance >= case.num_vacant + case.num_idle,
                is_prefilling=False,
            )
            for instance in range(case.num_instances)
        ),
        waiting=tuple(waiting),
        running=tuple(running),
        max_num_batched_tokens=65_536,
        max_num_seqs=256,
        now_s=10.0,
        flights=_flights(case, running),
    )


def _flights(case: Case, running: list[RunningView]) -> tuple[FlightView, ...]:
    flights = []
    for instance in range(case.num_vacant + case.num_idle, case.num_instances):
        requests = [request for request in running if request.kv[0][0] == instance] if case.num_instances < 100 else []
        names = tuple(request.request_id for request in requests) or ("r0",)
        num_keys = sum(request.num_tokens for request in requests) + len(names)
        flights.append(
            FlightView(
                plan=Decode(Group.of([instance]), (SubBatch(instance, names),)),
                group=Group.of([instance]),
                work=DecodeWork(rows=(len(names),), keys=(num_keys,)),
                started_s=9.99,
            )
        )
    return tuple(flights)


def measure(case: Case, num_samples: int, seed: int) -> dict[str, Any]:
    """Times of answers, in milliseconds."""
    random = np.random.default_rng(seed)
    model = RooflineModel(rates=DeviceRates.of_device("NVIDIA H200"), model=LLAMA3_8B)
    policy = EspPolicy(EspConfig(max_picked=case.max_picked), model)
    samples, num_prefilled = [], []
    for index in range(num_samples + 3):
        view = make_view(case, random)
        asked = policy.copy()
        begin = time.perf_counter()
        plans = asked.plan(view)
        elapsed_ms = 1e3 * (time.perf_counter() - begin)
        if index >= 3:
            samples.append(elapsed_ms)
            num_prefilled.append(sum(len(getattr(plan, "requests", ())) for plan in plans))
    p50, p90, p99 = np.percentile(samples, (50, 90, 99)).round(3).tolist()
    return {
        **dataclasses.asdict(case),
        "num_samples": num_samples,
        "p50_ms": p50,
        "p90_ms": p90,
        "p99_ms": p99,
        "mean_prefilled": float(np.mean(num_prefilled)),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, help="where to write the results, as JSON")
    parser.add_argument("--samples", type=int, default=200, help="answers a case, a tenth above 100 instances")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", choices=sorted(CASES), action="append", help="only this case; may be repeated")
    arguments = parser.parse_args(argv)
    results: dict[str, Any] = {}
    for name in tqdm(arguments.case or list(CASES)):
        case = CASES[name]
        num_samples = arguments.samples if case.num_instances < 100 else max(1, arguments.samples // 10)
        results[name] = measure(case, num_samples, arguments.seed)
        tqdm.write(f"{name}: " + ", ".join(f"{key} {value}" for key, value in results[name].items() if "_ms" in key))
    report = {
        "commit": checked_out_commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "seed": arguments.seed,
        "cases": results,
    }
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
