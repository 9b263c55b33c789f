"""A local runtime from a configuration: devices, weights, pool."""

from __future__ import annotations

import logging
import os
import pathlib

import jax
import jax.numpy as jnp

from loongjax.config import EngineConfig
from loongjax.core.cluster import ClusterShape
from loongjax.models.checkpoint import load_weights
from loongjax.models.config import ModelConfig
from loongjax.models.sharding import abstract_params, partition_specs
from loongjax.models.shipped import resolve_checkpoint
from loongjax.parallel.mesh import DeviceGrid, ReplicatedState
from loongjax.runtime.environment import device_environment
from loongjax.runtime.exchange import make_exchange
from loongjax.runtime.kv_pool import DeviceKVPool
from loongjax.runtime.local import LocalRuntime
from loongjax.runtime.model_spec import ModelSpec
from loongjax.runtime.program_calls import ProgramCalls
from loongjax.runtime.sizing import resolve_dtype, size_up
from loongjax.runtime.warm_up import warm_up

logger = logging.getLogger(__name__)


def build_runtime(config: EngineConfig) -> LocalRuntime:
    """Loads the checkpoint onto the devices and sizes the pool.

    Raises:
        ConfigError: a configuration that the model or the devices cannot follow.
        CheckpointError: a checkpoint that cannot be read or served.
    """
    _prepare_devices(config)
    checkpoint = resolve_checkpoint(config.checkpoint)
    model_config = ModelConfig.from_checkpoint(checkpoint)
    model_config.check_tp(config.tp)
    use_compilation_cache(config)
    grid = DeviceGrid(jax.devices(), tp=config.tp, num_instances=config.num_instances)
    dtype = resolve_dtype(config, model_config.dtype, grid.platform)
    spec = ModelSpec(model_config, dtype, config.tp)
    shards = load_weights(checkpoint, model_config, dtype=jnp.dtype(dtype), devices=grid.instances)
    return assemble_runtime(config, spec, grid, shards)


def assemble_runtime(config: EngineConfig, spec: ModelSpec, grid: DeviceGrid, shards: list[list]) -> LocalRuntime:
    """A runtime over weights that are on their devices already."""
    specs = partition_specs(abstract_params(spec.config, dtype=jnp.dtype(spec.dtype), tp=spec.tp))
    weights = ReplicatedState(grid, shards, specs)
    exchange = make_exchange(config, grid)
    sizes = size_up(config, spec, grid, weights)
    pool_shape = spec.kv_shard_shape(sizes.shape.num_pages, sizes.shape.page_size)
    kv_pool = DeviceKVPool(grid, pool_shape, jnp.dtype(spec.dtype))
    _log_sizes(sizes.shape, spec, weights, kv_pool)
    wants_warm_up = grid.platform == "gpu" if config.warm_up is None else config.warm_up
    if wants_warm_up:
        calls = ProgramCalls(
            spec=spec,
            grid=grid,
            weights=weights,
            kv_pool=kv_pool,
            exchange=exchange,
            buckets=sizes.buckets,
            max_extend_tokens=config.max_extend_tokens,
        )
        warm_up(calls, grid.num_instances)
    return LocalRuntime(
        spec=spec,
        grid=grid,
        weights=weights,
        kv_pool=kv_pool,
        exchange=exchange,
        shape=sizes.shape,
        limits=sizes.limits,
        buckets=sizes.buckets,
    )


def _prepare_devices(config: EngineConfig) -> None:
    """For processes whose environment was not prepared: the same, as far as JAX has not started yet."""
    os.environ.update(device_environment(config))
    try:
        jax.config.update("jax_num_cpu_devices", int(os.environ["JAX_NUM_CPU_DEVICES"]))
    except RuntimeError:
        logger.debug("JAX has started already, with the devices it has")


def use_compilation_cache(config: EngineConfig) -> None:
    """Every program is kept in the persistent cache: warming up compiles into it, and then loads from it."""
    folder = config.compilation_cache_dir or str(pathlib.Path.home() / ".cache" / "loongjax" / "xla")
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _log_sizes(shape: ClusterShape, spec: ModelSpec, weights: ReplicatedState, kv_pool: DeviceKVPool) -> None:
    logger.info(
        "%d instances of tp=%d, %s; each holds %.2f GiB of weights and a KV pool of %d tokens (%.2f GiB, pages of %d)",
        shape.num_instances,
        shape.tp,
        spec.dtype,
        weights.num_bytes_per_instance / 2**30,
        shape.num_slots,
        kv_pool.num_bytes_per_instance / 2**30,
        shape.page_size,
    )
