"""An engine from a configuration."""

from __future__ import annotations

from loongjax.config import EngineConfig
from loongjax.engine.client import ModelInfo
from loongjax.engine.core import EngineCore
from loongjax.engine.parts import EngineParts
from loongjax.models.generation import GenerationConfig
from loongjax.models.shipped import SHIPPED_NAME, resolve_checkpoint
from loongjax.models.tokenizer import load_tokenizer
from loongjax.runtime.build import build_runtime
from loongjax.scheduler.simple import SimplePolicy
from loongjax.scheduler.simple_config import SimplePolicyConfig


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
    runtime = build_runtime(config)
    info = ModelInfo(
        checkpoint=config.checkpoint or SHIPPED_NAME,
        max_model_len=runtime.limits.max_model_len,
        vocab_size=runtime.limits.vocab_size,
        eos_token_ids=generation.eos_token_ids,
        default_sampling=generation.default_sampling,
    )
    return EngineCore(
        runtime,
        build_policy(config),
        info=info,
        max_queue_len=config.max_queue_len,
        kv_bytes_per_token=runtime.num_kv_bytes_per_token,
        run_ahead=config.run_ahead,
        iteration_timeout_s=config.iteration_timeout_s,
    )


def build_policy(config: EngineConfig) -> SimplePolicy:
    """The policy of a configuration, which needs neither checkpoint nor devices."""
    max_requests_per_master = config.max_requests_per_master or max(1, config.max_num_seqs // 2)
    return SimplePolicy(
        SimplePolicyConfig(
            prefill_tokens_per_instance=config.prefill_tokens_per_instance,
            max_requests_per_master=max_requests_per_master,
        )
    )
