"""From the configuration of an engine to the policy it is served with."""

from __future__ import annotations

import pytest

from loongjax.config import EngineConfig
from loongjax.core.plan import Decode
from loongjax.scheduler.build import build_policy
from loongjax.scheduler.simple_config import SimplePolicyConfig
from loongjax.scheduler.validate import check_plan
from tests.scheduler.views import cluster, running


def masters(config: EngineConfig, num_requests: int, num_instances: int = 4) -> list[int]:
    """How many requests each master decodes, if all of them have their keys on one instance."""
    runs = [running(f"r{i}", i, (0, 30)) for i in range(num_requests)]
    view = cluster(num_instances, num_pages=2000, runs=runs, max_num_seqs=config.max_num_seqs)
    plans = build_policy(config, shape=view.shape, max_num_seqs=config.max_num_seqs).plan(view)
    check_plan(view, plans)
    (plan,) = plans
    assert isinstance(plan, Decode)
    return [len(batch.request_ids) for batch in plan.sub_batches]


@pytest.mark.parametrize(("num_requests", "sizes"), [(32, [32]), (33, [32, 1]), (64, [32, 32])])
def test_a_large_batch_gains_masters_with_default_settings(num_requests: int, sizes: list[int]) -> None:
    assert masters(EngineConfig(), num_requests) == sizes


@pytest.mark.parametrize("max_num_seqs", [2, 3, 8, 128])
def test_a_full_instance_always_gains_a_master(max_num_seqs: int) -> None:
    assert len(masters(EngineConfig(max_num_seqs=max_num_seqs), max_num_seqs)) > 1


def test_the_requests_of_a_master_can_be_set() -> None:
    assert masters(EngineConfig(max_requests_per_master=20), 60) == [20, 20, 20]
    assert masters(EngineConfig(max_requests_per_master=64), 64) == [64]


def test_one_sequence_at_a_time_works() -> None:
    assert masters(EngineConfig(max_num_seqs=1), 1) == [1]


def test_a_policy_without_a_configuration_has_the_defaults_of_one_with() -> None:
    config, default = EngineConfig(), SimplePolicyConfig()
    assert config.prefill_tokens_per_instance == default.prefill_tokens_per_instance
    assert config.max_num_seqs // 2 == default.max_requests_per_master
