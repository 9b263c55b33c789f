"""Policies by their names."""

from __future__ import annotations

import dataclasses
import logging
import os
import weakref

from loongjax.config import PolicyName, SchedulingConfig
from loongjax.core.cluster import ClusterShape
from loongjax.costmodel.model import CostModel
from loongjax.errors import ConfigError
from loongjax.scheduler.baselines.chunked import ChunkedPolicy
from loongjax.scheduler.baselines.disaggregated import DisaggregatedPolicy
from loongjax.scheduler.baselines.prefill_first import PrefillFirstPolicy
from loongjax.scheduler.baselines.replicated import ReplicatedPolicy
from loongjax.scheduler.baselines.static import StaticPolicy
from loongjax.scheduler.esp.config import EspConfig
from loongjax.scheduler.esp.explain import JsonLines
from loongjax.scheduler.esp.policy import EspPolicy
from loongjax.scheduler.policy import Policy
from loongjax.scheduler.simple import SimplePolicy
from loongjax.scheduler.simple_config import SimplePolicyConfig

logger = logging.getLogger(__name__)

_POLICIES_THAT_ASK = frozenset({"esp"})
_SETTINGS: dict[PolicyName, frozenset[str]] = {
    "esp": frozenset({"scale_up", "admission", "explain"}),
    "simple": frozenset({"prefill_tokens_per_instance", "max_requests_per_master"}),
    "static": frozenset(),
    "replicated": frozenset(),
    "prefill-first": frozenset(),
    "chunked": frozenset({"chunk_tokens"}),
    "disaggregated": frozenset({"num_prefill_instances"}),
}
"""What each policy is told, but for the times of iterations, which others than policies read too."""
_POLICIES_OF_ONE_INSTANCE_A_REQUEST = frozenset({"replicated", "chunked", "disaggregated"})


def needs_cost_model(config: SchedulingConfig) -> bool:
    """Whether the policy asks how long iterations take."""
    return config.policy in _POLICIES_THAT_ASK


def warn_of_unread_settings(config: SchedulingConfig) -> None:
    """Logs those that were changed and that the policy does not read, with their values; the cost model aside.

    For whoever builds policies, once, however many those are.
    """
    unread = [
        f"{field.name}={value!r}"
        for field in dataclasses.fields(SchedulingConfig)
        if field.name not in ("policy", "cost_model", *_SETTINGS[config.policy])
        and (value := getattr(config, field.name)) != field.default
    ]
    if unread:
        logger.warning("the policy %s does not read %s", config.policy, ", ".join(unread))


def build_policy(
    config: SchedulingConfig, *, shape: ClusterShape, max_num_seqs: int, cost_model: CostModel | None = None
) -> Policy:
    """The policy that a configuration names, for this cluster.

    Args:
        config: the name, and what the policy is told.
        shape: the cluster.
        max_num_seqs: requests that one master decodes at a time.
        cost_model: the times of iterations, for a policy that asks (`needs_cost_model`).

    Raises:
        ConfigError: the policy cannot serve such a cluster, or the file to explain in cannot be written.
    """
    match config.policy:
        case "esp":
            assert cost_model is not None, "the policy esp asks how long iterations take"
            return _build_esp(config, cost_model)
        case "simple":
            return SimplePolicy(
                SimplePolicyConfig(
                    prefill_tokens_per_instance=config.prefill_tokens_per_instance,
                    max_requests_per_master=config.max_requests_per_master or max(1, max_num_seqs // 2),
                )
            )
        case "static":
            return StaticPolicy(shape)
        case "replicated":
            return ReplicatedPolicy(shape)
        case "prefill-first":
            return PrefillFirstPolicy(shape)
        case "chunked":
            return ChunkedPolicy(shape, config.chunk_tokens)
        case "disaggregated":
            return DisaggregatedPolicy(shape, config.num_prefill_instances)


def _build_esp(config: SchedulingConfig, cost_model: CostModel) -> EspPolicy:
    esp_config = EspConfig(admission=config.admission, scale_up=config.scale_up)
    if config.explain is None:
        return EspPolicy(esp_config, cost_model)
    if config.cost_model is not None and _are_one_file(config.explain, config.cost_model):
        raise ConfigError(f"--explain {config.explain} is the file of --cost-model: give --explain another one")
    try:
        lines = JsonLines(config.explain)
    except OSError as error:
        raise ConfigError(
            f"--explain {config.explain} cannot be written ({error.strerror}): give the path of a file"
        ) from None
    policy = EspPolicy(esp_config, cost_model, explain=lines)
    weakref.finalize(policy, lines.close)
    return policy


def _are_one_file(path: str, other: str) -> bool:
    return os.path.exists(path) and os.path.exists(other) and os.path.samefile(path, other)


def keeps_to_one_instance(config: SchedulingConfig) -> bool:
    """Whether the policy computes a request, and keeps its keys, on one instance at a time."""
    return config.policy in _POLICIES_OF_ONE_INSTANCE_A_REQUEST


def largest_group(config: SchedulingConfig, num_instances: int) -> int:
    """Most instances that work on one iteration; smaller groups may form too."""
    return 1 if keeps_to_one_instance(config) else num_instances


def max_request_tokens(config: SchedulingConfig, shape: ClusterShape, max_num_batched_tokens: int) -> int:
    """Tokens of the longest request, prompt and output together, that the policy can always carry to its end.

    Its last token needs no slot, but may be a prompt's, and then has to be prefilled. Where prompts are cut, those that
    cannot be have a limit of their own: see `max_whole_prompt_len`.

    Args:
        config: names the policy.
        shape: the cluster.
        max_num_batched_tokens: tokens of one prefill on one instance.
    """
    num_instances = largest_group(config, shape.num_instances)
    in_pool = num_instances * shape.num_slots + 1
    return in_pool if config.cuts_prompts else min(in_pool, num_instances * max_num_batched_tokens)


def max_whole_prompt_len(config: SchedulingConfig, max_num_batched_tokens: int) -> int | None:
    """Tokens of the longest prompt that the policy can compute in one piece, where others may be longer; None: there
    are no longer ones.

    Args:
        config: names the policy.
        max_num_batched_tokens: tokens of one prefill on one instance.
    """
    return max_num_batched_tokens if config.cuts_prompts else None
