"""An engine from a configuration."""

from __future__ import annotations

import contextlib
import logging
import pathlib

import jax

from loongjax.config import EngineConfig
from loongjax.core.cluster import ClusterShape
from loongjax.costmodel.model_file import load
from loongjax.engine.client import ModelInfo
from loongjax.engine.core import EngineCore
from loongjax.engine.cost_model import cost_shape, resolve_cost_model
from loongjax.engine.parts import EngineParts
from loongjax.errors import ConfigError
from loongjax.models.config import ModelConfig
from loongjax.models.generation import GenerationConfig
from loongjax.models.shipped import SHIPPED_NAME, resolve_checkpoint
from loongjax.models.tokenizer import load_tokenizer
from loongjax.runtime.buckets import Buckets
from loongjax.runtime.build import build_runtime
from loongjax.runtime.model_spec import ModelSpec
from loongjax.runtime.protocol import RuntimeLimits
from loongjax.scheduler.build import (
    build_policy,
    keeps_to_one_instance,
    max_request_tokens,
    max_whole_prompt_len,
    needs_cost_model,
    warn_of_unread_settings,
)
from loongjax.scheduler.policy import Policy

logger = logging.getLogger(__name__)


def build_engine(config: EngineConfig) -> EngineParts:
    """A step loop on this process's devices, and its tokenizer.

    Raises:
        ConfigError: a configuration that the model or the devices cannot follow.
        CheckpointError: a checkpoint that cannot be read or served.
    """
    tokenizer = load_tokenizer(resolve_checkpoint(config.checkpoint))
    return EngineParts(build_core(config), tokenizer)


def build_core(config: EngineConfig) -> EngineCore:
    """The step loop alone, for a process that handles no text. Errors as `build_engine`."""
    checkpoint = resolve_checkpoint(config.checkpoint)
    generation = GenerationConfig.from_checkpoint(checkpoint)
    if needs_cost_model(config) and config.cost_model is not None:
        load(pathlib.Path(config.cost_model))  # so that a file which cannot be read is told before weights are loaded
    runtime = build_runtime(config)
    with contextlib.ExitStack() as on_error:
        on_error.callback(runtime.close)
        info = ModelInfo(
            checkpoint=config.checkpoint or SHIPPED_NAME,
            max_model_len=resolve_max_model_len(config, runtime.shape, runtime.limits),
            max_whole_prompt_len=max_whole_prompt_len(config, runtime.limits.max_num_batched_tokens),
            vocab_size=runtime.limits.vocab_size,
            eos_token_ids=generation.eos_token_ids,
            default_sampling=generation.default_sampling,
        )
        core = EngineCore(
            runtime,
            choose_policy(config, runtime.shape, runtime.limits, runtime.spec),
            info=info,
            max_queue_len=config.max_queue_len,
            kv_bytes_per_token=runtime.num_kv_bytes_per_token,
            run_ahead=config.run_ahead,
            iteration_timeout_s=config.iteration_timeout_s,
        )
        on_error.pop_all()
        return core


def choose_policy(config: EngineConfig, shape: ClusterShape, limits: RuntimeLimits, spec: ModelSpec) -> Policy:
    """The policy of a configuration, with its cost model if it asks for one; the log says which.

    Raises:
        ConfigError: the policy or the cost model does not fit the cluster or the model.
    """
    logger.info("policy: %s", config.policy)
    cost_model = None
    if needs_cost_model(config):
        device_kind = jax.devices()[0].device_kind
        cost_model = resolve_cost_model(
            config.cost_model,
            model=cost_shape(spec),
            cluster=shape,
            buckets=Buckets.of(shape, limits),
            device_kind=device_kind,
        )
    elif config.cost_model is not None:
        logger.warning("the policy %s asks no cost model: %s is not read", config.policy, config.cost_model)
    warn_of_unread_settings(config)
    if config.policy == "prefill-first":
        _check_that_it_is_one(shape, spec.config)
    return build_policy(config, shape=shape, max_num_seqs=limits.max_num_seqs, cost_model=cost_model)


def _check_that_it_is_one(shape: ClusterShape, model: ModelConfig) -> None:
    """Raises ConfigError for several instances. The policy would do so, too, but knows no model to say what works."""
    if shape.num_instances == 1:
        return
    num_devices = shape.num_instances * shape.tp
    tps = [tp for tp in model.possible_tps if tp <= num_devices]
    rest = "" if len(tps) == 1 else f" (the model can be cut over {', '.join(map(str, tps))} of {num_devices} devices)"
    raise ConfigError(
        f"the policy prefill-first runs one instance, got {shape.num_instances} instances of tp={shape.tp}: give "
        f"--num-instances 1 --tp {tps[-1]}{rest}"
    )


def resolve_max_model_len(config: EngineConfig, shape: ClusterShape, limits: RuntimeLimits) -> int:
    """Tokens of the longest request that runtime and policy can serve.

    Raises:
        ConfigError: more are asked for.
    """
    most = max_request_tokens(config, shape, limits.max_num_batched_tokens)
    if limits.max_model_len <= most or not keeps_to_one_instance(config):
        return limits.max_model_len  # what all instances together cannot hold is refused by the step loop
    if config.cuts_prompts:
        does, flags = "holds", "--num-slots"
    else:
        does, flags = "holds and prefills", "--num-slots and --max-num-batched-tokens"
    if config.max_model_len is None:
        logger.warning(
            "requests may have %d tokens, not %d: the policy %s keeps a request on one instance, which %s no more "
            "(raise %s, or choose another --policy)",
            most,
            limits.max_model_len,
            config.policy,
            does,
            flags,
        )
        return most
    raise ConfigError(
        f"max_model_len is {config.max_model_len}, but the policy {config.policy} keeps a request on one instance, "
        f"which {does} at most {most} tokens: lower --max-model-len to {most}, raise {flags}, or choose another "
        "--policy"
    )
