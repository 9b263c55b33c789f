"""From the configuration of an engine to the policy it is served with."""

from __future__ import annotations

import dataclasses
import logging

import pytest

from loongjax.config import EngineConfig
from loongjax.core.cluster import ClusterShape
from loongjax.core.plan import Decode
from loongjax.engine.build import choose_policy, resolve_max_model_len
from loongjax.errors import ConfigError
from loongjax.models.config import ModelConfig
from loongjax.runtime.model_spec import ModelSpec
from loongjax.runtime.protocol import RuntimeLimits
from loongjax.scheduler.baselines.prefill_first import PrefillFirstPolicy
from loongjax.scheduler.baselines.static import StaticPolicy
from loongjax.scheduler.build import build_policy
from loongjax.scheduler.esp.policy import EspPolicy
from loongjax.scheduler.simple_config import SimplePolicyConfig
from loongjax.scheduler.validate import check_plan
from tests.scheduler.views import cluster, running


def masters(config: EngineConfig, num_requests: int, num_instances: int = 4) -> list[int]:
    """How many requests each master decodes under the policy simple, if all have their keys on one instance."""
    config = dataclasses.replace(config, policy="simple")
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


LIMITS = RuntimeLimits(max_model_len=600, max_num_batched_tokens=1000, max_num_seqs=8, vocab_size=100)
SPEC = ModelSpec(
    ModelConfig(
        hidden_size=64, num_layers=2, num_q_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=128, vocab_size=100
    ),
    "float32",
)
FOUR = ClusterShape(num_instances=4, num_pages=10, page_size=16)


def test_a_policy_of_one_instance_a_request_shortens_the_context_and_the_log_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert resolve_max_model_len(EngineConfig(), FOUR, LIMITS) == 600
    assert not caplog.records
    assert resolve_max_model_len(EngineConfig(policy="replicated"), FOUR, LIMITS) == 161
    assert "requests may have 161 tokens, not 600: the policy replicated keeps a request on one inst" in caplog.text


def test_a_context_that_was_asked_for_and_does_not_fit_one_instance_is_refused() -> None:
    config = EngineConfig(policy="disaggregated", max_model_len=162)
    with pytest.raises(ConfigError, match=r"keeps a request on one instance, .* at most 161 tokens"):
        resolve_max_model_len(config, FOUR, LIMITS)


def test_where_prompts_are_cut_the_context_is_what_an_instance_holds_however_small_a_prefill() -> None:
    limits = dataclasses.replace(LIMITS, max_num_batched_tokens=50)
    assert resolve_max_model_len(EngineConfig(policy="chunked"), FOUR, limits) == 161
    config = EngineConfig(policy="chunked", max_model_len=162)
    with pytest.raises(
        ConfigError, match=r"holds at most 161 tokens: .* raise --num-slots, or choose another --policy"
    ):
        resolve_max_model_len(config, FOUR, limits)


def test_a_cost_model_that_nobody_asks_is_told(caplog: pytest.LogCaptureFixture) -> None:
    config = EngineConfig(policy="static", cost_model="model.json")
    assert isinstance(choose_policy(config, FOUR, LIMITS, SPEC), StaticPolicy)
    assert "the policy static asks no cost model: model.json is not read" in caplog.text


def test_settings_that_the_policy_does_not_read_are_told(caplog: pytest.LogCaptureFixture) -> None:
    choose_policy(EngineConfig(policy="static", scale_up=False, explain="why.jsonl"), FOUR, LIMITS, SPEC)
    assert caplog.messages == ["the policy static does not read scale_up=False, explain='why.jsonl'"]


def test_the_policy_is_told_and_a_cost_model_is_found_for_it(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="loongjax"):
        assert isinstance(choose_policy(EngineConfig(policy="esp"), FOUR, LIMITS, SPEC), EspPolicy)
    assert "policy: esp" in caplog.text
    assert "cost model: a roofline estimate" in caplog.text


def test_a_context_that_the_whole_cluster_cannot_hold_is_left_to_the_step_loop_to_refuse() -> None:
    config = EngineConfig(policy="static", max_model_len=5000)
    assert resolve_max_model_len(config, FOUR, dataclasses.replace(LIMITS, max_model_len=5000)) == 5000


@pytest.mark.parametrize(
    ("num_kv_heads", "advice"),
    [
        (2, r"--num-instances 1 --tp 2 \(the model can be cut over 1, 2 of 4 devices\)$"),
        (4, r"--num-instances 1 --tp 4 \(the model can be cut over 1, 2, 4 of 4 devices\)$"),
        (1, r"--num-instances 1 --tp 1$"),
    ],
)
def test_one_instance_is_advised_with_a_tp_that_the_model_can_be_cut_over(num_kv_heads: int, advice: str) -> None:
    spec = dataclasses.replace(SPEC, config=dataclasses.replace(SPEC.config, num_kv_heads=num_kv_heads))
    config = EngineConfig(policy="prefill-first")
    with pytest.raises(ConfigError, match=f"got 4 instances of tp=1: give {advice}"):
        choose_policy(config, FOUR, LIMITS, spec)
    one = dataclasses.replace(FOUR, num_instances=1)
    assert isinstance(choose_policy(config, one, LIMITS, spec), PrefillFirstPolicy)
