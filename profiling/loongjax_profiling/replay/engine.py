"""The engine of a replay: built in this process, rehearsed, and traced."""

from __future__ import annotations

import dataclasses
import sys
import time

import jax

from loongjax.costmodel.model import CostModel
from loongjax.engine.build import resolve_max_model_len
from loongjax.engine.client import ModelInfo
from loongjax.engine.core import EngineCore
from loongjax.engine.cost_model import cost_shape, resolve_cost_model
from loongjax.models.shipped import SHIPPED_NAME
from loongjax.runtime.build import build_runtime
from loongjax.runtime.local import LocalRuntime
from loongjax.scheduler.build import build_policy
from loongjax_profiling.random_runtime import build_random_runtime
from loongjax_profiling.replay.config import ReplayConfig
from loongjax_profiling.replay.rehearsal import rehearse
from loongjax_profiling.replay.traced_runtime import TracedRuntime
from loongjax_profiling.shapes import named_shape
from loongjax_profiling.simulate.cluster import ClusterSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplayEngine:
    """A step loop that is ready, and all that a simulation of it needs to know."""

    core: EngineCore
    runtime: TracedRuntime
    cluster: ClusterSpec
    """Its shape and limits."""
    cost_model: CostModel
    """Its times as the simulation, and the policy, take them to be."""
    hardware: str
    """Devices, as people name them: "4 x NVIDIA H200"."""
    ready_s: float
    """How long it took to build and rehearse."""


def build_replay_engine(config: ReplayConfig) -> ReplayEngine:
    """Builds the engine that a configuration describes.

    Raises:
        ConfigError: a configuration that the model or the devices cannot follow.
        CheckpointError: a checkpoint that cannot be read or served.
        EngineError: the rehearsal failed.
    """
    started_s = time.monotonic()
    local = _build_runtime(config)
    shape, limits = local.shape, local.limits
    device_kind = jax.devices()[0].device_kind
    cost_model = resolve_cost_model(
        config.cost_model, model=cost_shape(local.spec), cluster=shape, device_kind=device_kind
    )
    info = ModelInfo(
        checkpoint=config.random_weights or config.checkpoint or SHIPPED_NAME,
        max_model_len=resolve_max_model_len(config, shape, limits),
        vocab_size=limits.vocab_size,
        eos_token_ids=(),
        default_sampling={},
    )
    if config.warm_up is None:
        rehearse(local, max_extend_tokens=config.max_extend_tokens, progress=sys.stderr.isatty())
    runtime = TracedRuntime(local)
    core = EngineCore(
        runtime,
        build_policy(config, shape=shape, max_num_seqs=limits.max_num_seqs, cost_model=cost_model),
        info=info,
        max_queue_len=config.max_queue_len,
        kv_bytes_per_token=local.num_kv_bytes_per_token,
        run_ahead=config.run_ahead,
        iteration_timeout_s=config.iteration_timeout_s,
    )
    return ReplayEngine(
        core=core,
        runtime=runtime,
        cluster=ClusterSpec(
            num_instances=shape.num_instances,
            tp=shape.tp,
            num_slots=shape.num_slots,
            page_size=shape.page_size,
            max_model_len=info.max_model_len,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            max_num_seqs=limits.max_num_seqs,
        ),
        cost_model=cost_model,
        hardware=f"{shape.num_instances * shape.tp} x {device_kind}",
        ready_s=time.monotonic() - started_s,
    )


def _build_runtime(config: ReplayConfig) -> LocalRuntime:
    with_warm_up = dataclasses.replace(config, warm_up=bool(config.warm_up))
    if config.random_weights is not None:
        return build_random_runtime(with_warm_up, named_shape(config.random_weights))
    return build_runtime(with_warm_up)
