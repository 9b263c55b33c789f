"""How long the ESP policy takes to decide, on clusters as they look while serving.

    python -m benchmarks.decide --out benchmarks/results/decide.json

Each case is a cluster with so many instances, running and waiting requests. Requests' lengths are log-normal, their
keys on one instance each, and the policy knows how long the last outputs were. A sample is one answer to a view of its
own; as while serving, the policy has seen those who wait arrive, one after the other, and was asked about the same
cluster before, when the idle groups had a token less and the vacant instances were in a prefill: what to do with these
it has not been asked. In some cases somebody has come since. The views differ in what the engine asks about: one decode
group that is idle while the others are in flight (a step has ended, or is rehearsed), some instances vacant, or
everything idle. "picked" is how many waiting requests go through the batching of equation 5 in one answer, at most.
Fewer are prefilled by it (`mean_prefilled`), since of a batch only those start that weigh most: of 256 about 50.

Times are of the wall clock, of the thread (`cpu`: what the answer takes on a machine that nobody else uses; where the
two differ by milliseconds, the operating system ran somebody else meanwhile), and of garbage collections within
answers. What lives before a sample is frozen for the collector, as in an engine's process when it is built.
`yardstick_ns` is how long a step of a plain loop took at the time, in the mean over the case: a machine that others use
is now fast and now slow.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
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
from loongjax.core.plan import Decode, Prefill, PrefillRequest, SubBatch
from loongjax.core.request import FinishReason, ServiceLevel
from loongjax.costmodel.model_shape import ModelShape
from loongjax.costmodel.roofline import DeviceRates, RooflineModel
from loongjax.costmodel.work import DecodeWork, PrefillWork
from loongjax.scheduler.esp.config import EspConfig
from loongjax.scheduler.esp.output_lengths import WINDOW
from loongjax.scheduler.esp.policy import EspPolicy
from loongjax.scheduler.observation import RequestEnded
from loongjax.scheduler.request_view import RunningView, WaitingView
from loongjax.scheduler.residents import Residents
from loongjax.scheduler.view import ClusterView, FlightView, InstanceView
from loongjax.scheduler.waiting import Waiting
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

PAUSE_S = 0.0005
"""A step loop of eight instances waits 0.4 ms in the mean between two questions (`benchmarks.decide_while_serving`),
one of a single instance for as long as a decode step takes, 5 ms."""
NOW_S = 10.0
"""On the engine's clock; those who wait have come since 0."""


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
    num_new: int = 0
    """Waiting requests that have come since the policy was asked last."""
    ttft_slo_s: float | None = None
    """What those who wait wish for: their weights follow the clock, so that no search is like the last one."""


CASES = {
    "a step ends, nobody waits": Case(num_instances=8, num_running=256, num_waiting=0),
    "a step ends": Case(num_instances=8, num_running=256, num_waiting=1000),
    "an instance is vacant": Case(num_instances=8, num_running=256, num_waiting=1000, num_vacant=1),
    "half are vacant": Case(num_instances=8, num_running=256, num_waiting=1000, num_vacant=4),
    "all is idle": Case(num_instances=8, num_running=256, num_waiting=1000, num_vacant=4, num_idle=4),
    "a step ends, somebody has come": Case(num_instances=8, num_running=256, num_waiting=1000, num_new=1),
    "all is idle, somebody has come": Case(
        num_instances=8, num_running=256, num_waiting=1000, num_vacant=4, num_idle=4, num_new=1
    ),
    "a step ends, with wishes": Case(num_instances=8, num_running=256, num_waiting=1000, ttft_slo_s=30.0),
    "all is idle, with wishes": Case(
        num_instances=8, num_running=256, num_waiting=1000, num_vacant=4, num_idle=4, ttft_slo_s=30.0
    ),
    "half are vacant, 256 picked": Case(
        num_instances=8, num_running=256, num_waiting=1000, num_vacant=4, max_picked=256
    ),
    "64 instances": Case(num_instances=64, num_running=2048, num_waiting=10_000, num_vacant=4),
    "256 instances": Case(num_instances=256, num_running=8192, num_waiting=100_000, num_vacant=4),
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
        is_in_flight = instance >= case.num_vacant + case.num_idle
        running.append(
            RunningView(
                request_id=f"r{order}",
                order=order,
                num_tokens=num_tokens,
                max_total_tokens=num_prompt_tokens + 1000,
                max_output_tokens=1000 + is_in_flight,
                kv=((instance, num_tokens),),
                is_in_flight=is_in_flight,
                num_output_tokens=num_outputs,
                arrival_s=0.0,
                first_token_s=1.0,
            )
        )
    waiting = []
    arrivals_s = np.linspace(0.0, NOW_S, case.num_waiting, endpoint=False).tolist()
    for order, arrival_s in enumerate(arrivals_s, start=case.num_running):
        num_tokens = min(int(random.lognormal(7.5, 1.5)) + 1, 200_000)
        waiting.append(
            WaitingView(
                request_id=f"w{order}",
                order=order,
                num_tokens=num_tokens,
                max_total_tokens=num_tokens + 1000,
                keeps_kv=True,
                arrival_s=arrival_s,
                slo=ServiceLevel(ttft_s=case.ttft_slo_s),
            )
        )
    queue = Waiting(waiting)
    assert queue.table.shape[1] == case.num_waiting, "an engine keeps it up to date"
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
        waiting=queue,
        residents=Residents.of(running, case.num_instances),
        max_num_batched_tokens=65_536,
        max_num_seqs=256,
        now_s=NOW_S,
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
                started_s=NOW_S - 0.01,
            )
        )
    return tuple(flights)


def a_step_before(view: ClusterView, num_new: int = 0) -> ClusterView:
    """The same when those who are idle now had a token less, instances that are vacant now were in a prefill that kept
    no keys, and so many of those who wait had not come yet.
    """
    news: dict[str, RunningView | None] = {}
    for request in view.running:
        if not request.is_in_flight and request.num_output_tokens > 1:
            ((instance, num_tokens),) = request.kv
            news[request.request_id] = request._replace(
                num_tokens=num_tokens - 1,
                num_output_tokens=request.num_output_tokens - 1,
                kv=((instance, num_tokens - 1),),
            )
    vacant = [local.instance for local in view.residents.local if not local.requests]
    prefills = [Prefill(Group.of([instance]), (PrefillRequest(f"echo{instance}", ()),)) for instance in vacant]
    return dataclasses.replace(
        view,
        instances=tuple(
            [
                dataclasses.replace(instance, is_busy=True, is_prefilling=True)
                if instance.instance in vacant
                else instance
                for instance in view.instances
            ]
        ),
        residents=view.residents.after(news, ()),
        waiting=Waiting(view.waiting[:-num_new]) if num_new else view.waiting,
        now_s=view.now_s - 0.01,
        flights=(
            *view.flights,
            *[
                FlightView(plan=plan, group=plan.group, work=PrefillWork(new_lens=(1000,)), started_s=NOW_S - 0.02)
                for plan in prefills
            ],
        ),
    )


def while_nobody_is_idle(view: ClusterView) -> ClusterView:
    """The same when a policy can only take notice of who waits."""
    busy = [dataclasses.replace(instance, is_busy=True) for instance in view.instances]
    return dataclasses.replace(view, instances=tuple(busy))


class CollectorClock:
    """Adds up the time that garbage collections take."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._begin_s = 0.0

    def __call__(self, phase: str, info: dict[str, int]) -> None:
        """For `gc.callbacks`."""
        if phase == "start":
            self._begin_s = time.perf_counter()
        else:
            self.seconds += time.perf_counter() - self._begin_s


def make_policy(case: Case, random: np.random.Generator) -> EspPolicy:
    """One that has seen as many outputs as it remembers."""
    model = RooflineModel(rates=DeviceRates.of_device("NVIDIA H200"), model=LLAMA3_8B)
    policy = EspPolicy(EspConfig(max_picked=case.max_picked), model)
    policy.observe(
        [
            RequestEnded(num_prompt_tokens=1000, num_output_tokens=int(length), finish_reason=FinishReason.STOP)
            for length in random.integers(1, 500, WINDOW)
        ]
    )
    return policy


def measure(case: Case, num_samples: int, seed: int, pause_s: float) -> dict[str, Any]:
    """Times of answers, in milliseconds."""
    random = np.random.default_rng(seed)
    policy = make_policy(case, random)
    clock = CollectorClock()
    gc.callbacks.append(clock)
    wall_ms, cpu_ms, collector_ms, num_prefilled, yardsticks_ns = [], [], [], [], []
    for index in range(num_samples + 3):
        view = make_view(case, random)
        asked = policy.copy()
        before = a_step_before(view, case.num_new)
        asked.plan(while_nobody_is_idle(before))
        asked.copy().plan(before)
        gc.freeze()
        # An engine has waited for a completion. Who has computed without a pause is interrupted first.
        time.sleep(pause_s)
        clock.seconds = 0.0
        begin_s, begin_cpu_s = time.perf_counter(), time.thread_time()
        plans = asked.plan(view)
        cpu_s, wall_s = time.thread_time() - begin_cpu_s, time.perf_counter() - begin_s
        gc.unfreeze()
        if index >= 3:
            yardsticks_ns.append(yardstick_ns())
            wall_ms.append(1e3 * wall_s)
            cpu_ms.append(1e3 * cpu_s)
            collector_ms.append(1e3 * clock.seconds)
            num_prefilled.append(sum(len(plan.requests) for plan in plans if isinstance(plan, Prefill)))
    gc.callbacks.remove(clock)
    return {
        **dataclasses.asdict(case),
        "num_samples": num_samples,
        **percentiles("", wall_ms),
        **percentiles("cpu_", cpu_ms),
        "max_collector_ms": round(max(collector_ms), 3),
        "mean_prefilled": float(np.mean(num_prefilled)),
        "yardstick_ns": round(float(np.mean(yardsticks_ns)), 1),
    }


YARDSTICK_STEPS = 2000


def yardstick_ns() -> float:
    """Of one step of a loop of a few bytecodes, in CPU time."""
    begin_s = time.thread_time()
    total = 0
    for i in range(YARDSTICK_STEPS):
        total += i * i % 7
    return 1e9 * (time.thread_time() - begin_s) / YARDSTICK_STEPS


def percentiles(kind: str, samples_ms: list[float]) -> dict[str, float]:
    """p50, p90 and p99, by names that begin with the kind."""
    values = np.percentile(samples_ms, (50, 90, 99)).round(3).tolist()
    return {f"{kind}{name}_ms": value for name, value in zip(("p50", "p90", "p99"), values, strict=True)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of every benchmark of decisions."""
    parser.add_argument("--out", type=pathlib.Path, help="where to write the results, as JSON")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pause-s", type=float, default=PAUSE_S, help="before each answer, in which caches cool down")


def origin(arguments: argparse.Namespace) -> dict[str, Any]:
    """Where results come from, of these arguments."""
    return {
        "commit": checked_out_commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "seed": arguments.seed,
        "pause_s": arguments.pause_s,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=200, help="answers a case, a tenth above 100 instances")
    add_arguments(parser)
    parser.add_argument("--case", choices=sorted(CASES), action="append", help="only this case; may be repeated")
    arguments = parser.parse_args(argv)
    results: dict[str, Any] = {}
    for name in tqdm(arguments.case or list(CASES)):
        case = CASES[name]
        num_samples = arguments.samples if case.num_instances < 100 else max(1, arguments.samples // 10)
        results[name] = measure(case, num_samples, arguments.seed, arguments.pause_s)
        tqdm.write(
            f"{name}: "
            + ", ".join(f"{key} {value}" for key, value in results[name].items() if key.endswith(("_ms", "_ns")))
        )
    report = {**origin(arguments), "cases": results}
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
