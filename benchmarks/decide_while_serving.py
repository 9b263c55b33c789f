"""How long the ESP policy takes to decide while it serves: every question of a simulated engine, as they come.

    python -m benchmarks.decide_while_serving --out benchmarks/results/decide_while_serving_2_cpu_cores.json

Eight instances of an H200's speed serve an 8B. So many requests live at any time that about 256 run and 1,000 wait:
whoever ends is followed by another. The engine runs ahead, as a real one does, so that most questions are rehearsals
beside a running step. `benchmarks.decide` has the kinds of clusters one by one, and says what is measured.

Questions are asked when the virtual clock says so, in real time: in between the thread sleeps, as a step loop waits for
completions, and who is late does not wait. `--pause-s` sleeps for as long before each question instead.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import sys
import time
from collections.abc import Sequence

import numpy as np

from benchmarks.decide import LLAMA3_8B, add_arguments, origin, percentiles, yardstick_ns
from loongjax.core.plan import Plan, Prefill
from loongjax.core.request import ServiceLevel
from loongjax.costmodel.roofline import DeviceRates, RooflineModel
from loongjax.scheduler.esp.config import EspConfig
from loongjax.scheduler.esp.policy import EspPolicy
from loongjax.scheduler.observation import Observation
from loongjax.scheduler.policy import Policy
from loongjax.scheduler.view import ClusterView
from loongjax_profiling.simulate.cluster import ClusterSpec
from loongjax_profiling.simulate.pod import Job, Pod
from loongjax_profiling.simulate.workload.request import WorkloadRequest

NUM_LIVE = 1256
CLUSTER = ClusterSpec(
    num_instances=8,
    tp=1,
    num_slots=43_008,
    page_size=64,
    max_model_len=16_384,
    max_num_batched_tokens=65_536,
    max_num_seqs=256,
)
"""Instances whose memory holds about 32 requests each."""
MAX_PICKED = 64
STEP_S = 1.0
"""Of the virtual clock, between two looks at how many questions there were."""


@dataclasses.dataclass
class Log:
    """What is known of the questions that were timed."""

    pause_s: float | None
    """Before each question; None: until the time of the question has come."""
    is_on: bool = False
    cpu_ms: list[float] = dataclasses.field(default_factory=list)
    wall_ms: list[float] = dataclasses.field(default_factory=list)
    yardsticks_ns: list[float] = dataclasses.field(default_factory=list)
    num_running: list[int] = dataclasses.field(default_factory=list)
    num_waiting: list[int] = dataclasses.field(default_factory=list)
    num_prefilled: list[int] = dataclasses.field(default_factory=list)
    waited_ms: list[float] = dataclasses.field(default_factory=list)
    _ahead_s: float | None = None
    """How far the virtual clock is before the real one; None: nothing was asked yet."""

    def ask(self, policy: Policy, view: ClusterView) -> tuple[Plan, ...]:
        """Its answer, timed behind a pause."""
        if not self.is_on:
            return policy.plan(view)
        gc.freeze()
        self._wait(view.now_s)
        begin_s, begin_cpu_s = time.perf_counter(), time.thread_time()
        plans = policy.plan(view)
        cpu_s, wall_s = time.thread_time() - begin_cpu_s, time.perf_counter() - begin_s
        gc.unfreeze()
        self.cpu_ms.append(1e3 * cpu_s)
        self.wall_ms.append(1e3 * wall_s)
        self.yardsticks_ns.append(yardstick_ns())
        self.num_running.append(len(view.running))
        self.num_waiting.append(len(view.waiting))
        self.num_prefilled.append(sum(len(plan.requests) for plan in plans if isinstance(plan, Prefill)))
        return plans

    def _wait(self, question_s: float) -> None:
        """Before a question of that time on the virtual clock."""
        pause_s = self.pause_s
        if pause_s is None:
            ahead_s = question_s - time.perf_counter()
            pause_s = 0.0 if self._ahead_s is None else max(0.0, ahead_s - self._ahead_s)
            self._ahead_s = ahead_s - pause_s
        self.waited_ms.append(1e3 * pause_s)
        time.sleep(pause_s)


class TimedPolicy(Policy):
    """Another policy, whose answers are timed, and those of its copies.

    Args:
        policy: that one.
        log: of the times.
    """

    def __init__(self, policy: Policy, log: Log) -> None:
        self._policy = policy
        self._log = log

    def plan(self, view: ClusterView) -> tuple[Plan, ...]:
        return self._log.ask(self._policy, view)

    def observe(self, observations: Sequence[Observation]) -> None:
        self._policy.observe(observations)

    def copy(self) -> TimedPolicy:
        return TimedPolicy(self._policy.copy(), self._log)


def serve(log: Log, num_samples: int, num_ended_before: int, seed: int) -> None:
    """Serves until so many questions are timed, from when so many requests have ended on."""
    random = np.random.default_rng(seed)
    model = RooflineModel(rates=DeviceRates.of_device("NVIDIA H200"), model=LLAMA3_8B)
    num_added = num_ended = 0

    def add(time_s: float) -> None:
        nonlocal num_added
        request = WorkloadRequest(
            arrival_s=time_s,
            prompt_len=min(int(random.lognormal(7.5, 1.0)) + 1, 8192),
            output_len=int(random.integers(1, 500)),
        )
        num_added += 1
        pod.add(Job(request_id=f"r{num_added}", request=request, slo=ServiceLevel()), time_s)

    def follow(_: object) -> None:
        nonlocal num_ended
        num_ended += 1
        add(pod.now_s)

    pod = Pod(
        CLUSTER,
        TimedPolicy(EspPolicy(EspConfig(max_picked=MAX_PICKED), model), log),
        model,
        run_ahead=True,
        on_record=follow,
    )
    for _ in range(NUM_LIVE):
        add(0.0)
    while len(log.cpu_ms) < num_samples:
        pod.run_until(pod.now_s + STEP_S)
        log.is_on = num_ended >= num_ended_before


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4000, help="questions, at least")
    parser.add_argument("--ended-before", type=int, default=400, help="requests, before any question is timed")
    add_arguments(parser)
    parser.set_defaults(pause_s=None)
    arguments = parser.parse_args(argv)
    log = Log(arguments.pause_s)
    serve(log, arguments.samples, arguments.ended_before, arguments.seed)
    report = {
        **origin(arguments),
        "num_instances": CLUSTER.num_instances,
        "max_picked": MAX_PICKED,
        "num_questions": len(log.cpu_ms),
        "mean_running": round(float(np.mean(log.num_running)), 1),
        "mean_waiting": round(float(np.mean(log.num_waiting)), 1),
        "mean_wait_ms": round(float(np.mean(log.waited_ms)), 3),
        "share_with_prefills": round(float(np.mean(np.array(log.num_prefilled) > 0)), 3),
        **percentiles("", log.wall_ms),
        **percentiles("cpu_", log.cpu_ms),
        "yardstick_ns": round(float(np.mean(log.yardsticks_ns)), 1),
    }
    print(json.dumps(report, indent=2))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
