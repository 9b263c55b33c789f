"""The engine of a replay: built in this process, rehearsed, and traced."""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import time

import jax

from loongjax.costmodel.model_file import load
from loongjax.engine.build import resolve_max_model_len
from loongjax.engine.client import ModelInfo
from loongjax.engine.core import EngineCore
from loongjax.engine.cost_model import cost_shape, resolve_cost_model
from loongjax.models.shipped import SHIPPED_NAME
from loongjax.runtime.buckets import Buckets
from loongjax.runtime.build import build_runtime
from loongjax.runtime.local import LocalRuntime
from loongjax.scheduler.build import build_policy, max_whole_prompt_len, warn_of_unread_settings
from loongjax_profiling.random_runtime import build_random_runtime
from loongjax_profiling.replay.config import ReplayConfig
from loongjax_profiling.replay.rehearsal import rehearse
from loongjax_profiling.replay.traced_runtime import TracedRuntime
from loongjax_profiling.shapes import named_shape
from loongjax_profiling.simulate.cluster import ClusterSpec


class ReplayEngine:
    """A runtime that is ready, step loops over it, and all that a simulation of them needs to know."""

    def __init__(self, config: ReplayConfig) -> None:
        """Builds and rehearses the runtime that a configuration describes.

        Raises:
            ConfigError: a configuration that the model or the devices cannot follow.
            CheckpointError: a checkpoint that cannot be read or served.
            EngineError: the rehearsal failed.
        """
        started_s = time.monotonic()
        if config.cost_model is not None:
            load(pathlib.Path(config.cost_model))  # a file that cannot be read is told before weights are loaded
        warn_of_unread_settings(config)
        local = _build_runtime(config)
        shape, limits = local.shape, local.limits
        device_kind = jax.devices()[0].device_kind
        self._config = config
        self._num_kv_bytes_per_token = local.num_kv_bytes_per_token
        self.runtime = TracedRuntime(local)
        self.cost_model = resolve_cost_model(
            config.cost_model,
            model=cost_shape(local.spec),
            cluster=shape,
            buckets=Buckets.of(shape, limits),
            device_kind=device_kind,
        )
        """The times of iterations as the simulation, and the policy, take them to be."""
        self.info = ModelInfo(
            checkpoint=config.random_weights or config.checkpoint or SHIPPED_NAME,
            max_model_len=resolve_max_model_len(config, shape, limits),
            max_whole_prompt_len=max_whole_prompt_len(config, limits.max_num_batched_tokens),
            vocab_size=limits.vocab_size,
            eos_token_ids=(),
            default_sampling={},
        )
        self.cluster = ClusterSpec(
            num_instances=shape.num_instances,
            tp=shape.tp,
            num_slots=shape.num_slots,
            page_size=shape.page_size,
            max_model_len=self.info.max_model_len,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            max_num_seqs=limits.max_num_seqs,
        )
        """Its shape and limits, for a simulation."""
        self.hardware = f"{shape.num_instances * shape.tp} x {device_kind}"
        """Devices, as people name them: "4 x NVIDIA H200"."""
        if config.warm_up is None:
            rehearse(local, max_extend_tokens=config.max_extend_tokens, progress=sys.stderr.isatty())
        self.ready_s = time.monotonic() - started_s
        """How long all this took."""

    def new_core(self) -> EngineCore:
        """A step loop without requests, whose policy has seen nothing, once the one before it is idle."""
        config, runtime = self._config, self.runtime
        policy = build_policy(
            config, shape=runtime.shape, max_num_seqs=runtime.limits.max_num_seqs, cost_model=self.cost_model
        )
        return EngineCore(
            runtime,
            policy,
            info=self.info,
            max_queue_len=config.max_queue_len,
            kv_bytes_per_token=self._num_kv_bytes_per_token,
            run_ahead=config.run_ahead,
            iteration_timeout_s=config.iteration_timeout_s,
        )

    def close(self) -> None:
        """Gives the devices back."""
        self.runtime.close()


def _build_runtime(config: ReplayConfig) -> LocalRuntime:
    with_warm_up = dataclasses.replace(config, warm_up=bool(config.warm_up))
    if config.random_weights is not None:
        return build_random_runtime(with_warm_up, named_shape(config.random_weights))
    return build_runtime(with_warm_up)
