"""How large the KV pool can be, and how long a request."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from loongjax.config import CPU_NUM_SLOTS, EngineConfig
from loongjax.core.cluster import ClusterShape, Group
from loongjax.errors import ConfigError
from loongjax.pallas_kernels.extend_attention.api import default_variant
from loongjax.pallas_kernels.extend_attention.mosaic_gpu import brings_into_order
from loongjax.parallel.mesh import DeviceGrid, ReplicatedState
from loongjax.runtime.buckets import Buckets, fit, token_sizes
from loongjax.runtime.kv_pool import KV_POOL_SPEC
from loongjax.runtime.model_spec import ModelSpec
from loongjax.runtime.packing import empty_prefill
from loongjax.runtime.programs import BY_RANK, prefill_step
from loongjax.runtime.protocol import RuntimeLimits

logger = logging.getLogger(__name__)

SAMPLER_BYTES_PER_LOGIT = 32
"""Logits, their sorted copy, penalty counts and the program's own temporaries."""


def pool_shape(config: EngineConfig, spec: ModelSpec, grid: DeviceGrid, weights: ReplicatedState) -> ClusterShape:
    """The pool's size by instance: `num_slots` if given, else what the devices' free memory holds.

    Raises:
        ConfigError: not even one page is left.
    """
    num_slots = config.num_slots
    if num_slots is None:
        num_slots = CPU_NUM_SLOTS if grid.platform == "cpu" else _slots_in_free_memory(config, spec, grid, weights)
    num_pages = num_slots // config.page_size
    if num_pages < 1:
        raise ConfigError(
            f"no memory is left for a KV pool ({num_slots} tokens, and a page holds {config.page_size}): "
            "lower --max-num-batched-tokens or --max-num-seqs, or raise --tp or --memory-fraction"
        )
    return ClusterShape(num_instances=grid.num_instances, num_pages=num_pages, page_size=config.page_size, tp=config.tp)


def runtime_limits(config: EngineConfig, spec: ModelSpec, shape: ClusterShape) -> RuntimeLimits:
    """What one iteration holds; the context length is capped by the whole pool and, unless prompts are cut, by the
    largest prefill."""
    context_len = spec.config.context_len
    wanted = config.max_model_len or context_len
    in_pool = shape.num_instances * shape.num_slots
    in_prefill = shape.num_instances * config.max_num_batched_tokens
    if config.cuts_prompts:
        max_model_len = min(wanted, in_pool)
        bound, flags = f"the KV pool holds {in_pool}", "--num-slots raises it"
    else:
        max_model_len = min(wanted, in_pool, in_prefill)
        bound = f"the KV pool holds {in_pool} and one prefill {in_prefill}"
        flags = "--num-slots, --max-num-batched-tokens and --num-instances raise them"
    if max_model_len < wanted:
        logger.warning("requests may have %d tokens, not %d: %s (%s)", max_model_len, wanted, bound, flags)
    if wanted > context_len:
        logger.warning("--max-model-len %d exceeds the context that the model was made for, %d", wanted, context_len)
    return RuntimeLimits(
        max_model_len=max_model_len,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_num_seqs=config.max_num_seqs,
        vocab_size=spec.config.vocab_size,
    )


def _slots_in_free_memory(config: EngineConfig, spec: ModelSpec, grid: DeviceGrid, weights: ReplicatedState) -> int:
    """Tokens an instance can hold in what its fullest device has left beside weights and workspace."""
    free = min(_free_bytes(device) for devices in grid.instances for device in devices)
    workspace = max(_workspace_bytes(config, spec, grid, weights, dop) for dop in {1, grid.num_instances})
    num_logits = config.max_num_seqs * spec.config.padded_vocab_size(spec.tp)
    left = free - workspace - SAMPLER_BYTES_PER_LOGIT * num_logits
    num_bytes_per_token = spec.num_kv_bytes_per_token // spec.tp
    if _copies_keys(config, spec, grid):
        # All keys and values of one layer, in the order of an extend's table.
        num_bytes_per_token += num_bytes_per_token // spec.config.num_layers
    logger.info(
        "memory of a device: %.2f GiB free, %.2f GiB workspace, %.2f GiB KV pool",
        free / 2**30,
        workspace / 2**30,
        left / 2**30,
    )
    return max(0, left) // num_bytes_per_token


def _copies_keys(config: EngineConfig, spec: ModelSpec, grid: DeviceGrid) -> bool:
    """Whether an extend may copy what the pool holds of a layer."""
    if config.max_extend_tokens is None:
        return False
    sizes = token_sizes(config.max_num_batched_tokens)
    largest = fit(min(config.max_extend_tokens, sizes[-1]), sizes)
    num_rows = largest * spec.config.num_q_heads // spec.config.num_kv_heads
    device = grid.instances[0][0]
    variant = default_variant(
        grid.platform,
        getattr(device, "compute_capability", ""),
        spec.dtype,
        spec.config.head_dim,
        page_size=config.page_size,
        num_rows=largest,
        num_requests=1,
    )
    return variant == "mosaic_gpu" and brings_into_order(config.page_size, num_rows)


def _free_bytes(device: jax.Device) -> int:
    stats = device.memory_stats()
    if stats is None:
        raise ConfigError(f"{device} does not report its memory: give --num-slots")
    # A twentieth stays free for fragmentation and for the views' own small arrays.
    return int(0.95 * stats["bytes_limit"]) - stats["bytes_in_use"]


def _workspace_bytes(
    config: EngineConfig, spec: ModelSpec, grid: DeviceGrid, weights: ReplicatedState, dop: int
) -> int:
    """Temporary and output memory on one device of the largest prefill of this degree of parallelism."""
    group = Group(tuple(range(dop)))
    num_tokens = config.max_num_batched_tokens

    def abstract(shape: tuple[int, ...], dtype: Any, cut: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=grid.sharding(group, cut))

    layers, two, pages, page_size, _, head_dim = spec.kv_shard_shape(1, config.page_size)
    pool_shape = (dop, layers, two, pages, page_size, spec.config.num_kv_heads, head_dim)
    buckets = Buckets.for_limits(max_num_batched_tokens=num_tokens, max_num_seqs=config.max_num_seqs, num_pages=pages)
    batch = jax.tree.map(
        lambda leaf: abstract(leaf.shape, leaf.dtype, BY_RANK), empty_prefill(dop, num_tokens, buckets)
    )
    with jax.set_mesh(grid.mesh(group)):
        lowered = prefill_step.lower(
            spec, weights.view(group), abstract(pool_shape, jnp.dtype(spec.dtype), KV_POOL_SPEC), batch
        )
        memory = lowered.compile().memory_analysis()
    assert memory is not None, "only platforms that report their memory are asked"
    return memory.temp_size_in_bytes + memory.output_size_in_bytes


def resolve_dtype(config: EngineConfig, spec_dtype: str, platform: str) -> str:
    """The type to serve in: `auto` is the checkpoint's own, except that float32 becomes bfloat16 on GPU."""
    if config.dtype != "auto":
        return config.dtype
    if spec_dtype == "float32" and platform == "gpu":
        logger.info("the checkpoint is float32; serving it as bfloat16 (--dtype float32 keeps it)")
        return "bfloat16"
    return spec_dtype


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Everything that is fixed once the devices' memory is known."""

    shape: ClusterShape
    limits: RuntimeLimits
    buckets: Buckets


def size_up(config: EngineConfig, spec: ModelSpec, grid: DeviceGrid, weights: ReplicatedState) -> Sizes:
    """Sizes the pool, the limits and the buckets. Raises ConfigError if nothing fits."""
    shape = pool_shape(config, spec, grid, weights)
    limits = runtime_limits(config, spec, shape)
    return Sizes(shape, limits, Buckets.of(shape, limits))
