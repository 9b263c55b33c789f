"""A runtime whose weights are random, made on the devices: for measuring where there is no checkpoint."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from loongjax.config import EngineConfig
from loongjax.models.checkpoint import random_weights
from loongjax.models.config import ModelConfig
from loongjax.parallel.mesh import DeviceGrid
from loongjax.runtime.build import assemble_runtime, use_compilation_cache
from loongjax.runtime.local import LocalRuntime
from loongjax.runtime.model_spec import ModelSpec
from loongjax.runtime.sizing import resolve_dtype


def build_random_runtime(config: EngineConfig, model: ModelConfig) -> LocalRuntime:
    """As `build_runtime`, but for a model of this shape with random weights.

    The environment must have been prepared (`device_environment`) before JAX started.

    Raises:
        ConfigError: a configuration that the model or the devices cannot follow.
    """
    model.check_tp(config.tp)
    use_compilation_cache(config)
    grid = DeviceGrid(jax.devices(), tp=config.tp, num_instances=config.num_instances)
    dtype = resolve_dtype(config, model.dtype, grid.platform)
    spec = ModelSpec(model, dtype, config.tp)
    shards = random_weights(model, dtype=jnp.dtype(dtype), devices=grid.instances, seed=0)
    jax.block_until_ready([jax.tree.leaves(rank) for instance in shards for rank in instance])
    return assemble_runtime(config, spec, grid, shards)
