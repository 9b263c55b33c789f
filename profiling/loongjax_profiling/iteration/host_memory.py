"""Virtual devices share the machine's memory: what they would take of it, before they take it."""

from __future__ import annotations

import os

from loongjax.costmodel.model_shape import ModelShape
from loongjax.errors import ConfigError


def check_host_memory(
    model: ModelShape, *, num_instances: int, num_slots: int, memory_bytes: int | None = None
) -> None:
    """Refuses what would end by the system's killing the process.

    Args:
        model: of which each instance holds a replica.
        num_instances: of virtual devices.
        num_slots: tokens that one instance's part of the KV pool holds.
        memory_bytes: of the machine; None: all that it has.

    Raises:
        ConfigError: replicas and pools take more than that.
    """
    if memory_bytes is None:
        memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    embedding_bytes = model.vocab_size * model.hidden_size * model.dtype_bytes
    needed_bytes = num_instances * (model.weight_bytes + embedding_bytes + num_slots * model.kv_bytes_per_token)
    if needed_bytes > memory_bytes:
        raise ConfigError(
            f"{num_instances} instances on CPU take {needed_bytes / 1e9:.0f} GB for weights and KV pools, and this "
            f"machine has {memory_bytes / 1e9:.0f} GB: lower --num-cpu-devices or --num-slots, or take "
            "--random-weights tiny"
        )
