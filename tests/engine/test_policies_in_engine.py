"""Whichever policy decides, every request gets the tokens that it gives alone."""

from __future__ import annotations

import dataclasses
import random

import pytest

from loongjax.config import POLICIES, SchedulingConfig
from loongjax.core.iteration import Iteration, PrefillIteration, RecoverIteration
from loongjax.costmodel.roofline import DeviceRates, RooflineModel
from loongjax.scheduler.build import build_policy
from loongjax.scheduler.policy import Policy
from tests.costmodel.shapes import LLAMA2_7B
from tests.engine.cluster import Cluster, Journal, assert_nothing_leaks, run

EACH = pytest.mark.parametrize("name", POLICIES)


def cluster_for(name: str) -> Cluster:
    """Small enough for preemptions, and one instance holds any request."""
    cluster = Cluster(num_pages=16, max_model_len=48)
    return dataclasses.replace(cluster, num_instances=1) if name == "prefill-first" else cluster


def policy_for(name: str, cluster: Cluster) -> Policy:
    config = SchedulingConfig(policy=name)  # pyright: ignore[reportArgumentType]
    roofline = RooflineModel(rates=DeviceRates.of_device("H200"), model=LLAMA2_7B)
    return build_policy(config, shape=cluster.shape, max_num_seqs=cluster.max_num_seqs, cost_model=roofline)


@EACH
@pytest.mark.parametrize("failure_rate", [0.0, 0.03])
def test_every_request_gets_its_own_tokens(name: str, failure_rate: float) -> None:
    rng, cluster = random.Random(name), cluster_for(name)

    def fails(iteration: Iteration) -> bool:
        return not isinstance(iteration, RecoverIteration) and rng.random() < failure_rate

    def duration_s(iteration: Iteration) -> float:
        return rng.uniform(1.0, 20.0) if isinstance(iteration, PrefillIteration) else rng.uniform(0.5, 1.5)

    runtime = cluster.runtime(duration_s=duration_s, fails=fails)
    core, journal = cluster.core(runtime, policy_for(name, cluster)), Journal()
    requests = [cluster.request(f"r{i}", rng.randint(1, 30), rng.randint(0, 18)) for i in range(40)]
    for request in requests:
        core.add(request)
        for _ in range(rng.randint(0, 3)):
            journal.write(core.step(1.0))
    run(core, journal)
    for request in requests:
        journal.check(request)
    assert_nothing_leaks(core)


@EACH
def test_decodes_run_ahead_under_every_policy(name: str) -> None:
    cluster = cluster_for(name)
    runtime = cluster.runtime()
    core = cluster.core(runtime, policy_for(name, cluster))
    request = cluster.request("alone", 4, 12)
    core.add(request)
    run(core).check(request)
    assert runtime.max_in_flight == 2
