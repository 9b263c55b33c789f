"""What XLA must be told before it starts. Imports no JAX: a parent process prepares a child's environment with it."""

from __future__ import annotations

import os

from loongjax.config import EngineConfig


def device_environment(config: EngineConfig) -> dict[str, str]:
    """Environment variables that must be set before JAX starts its back end. What is set already stays."""
    wanted = {
        # XLA's CPU client sizes its thread pool by this, and collectives can deadlock in a small one.
        "NPROC": "32",
        "JAX_NUM_CPU_DEVICES": str(config.num_cpu_devices),
        "XLA_PYTHON_CLIENT_MEM_FRACTION": str(config.memory_fraction),
        # One process drives many GPUs: NCCL must launch in the order in which its one thread dispatches.
        "NCCL_LAUNCH_ORDER_IMPLICIT": "1",
        # NVLink multicast can take GPUs that others share out of service.
        "NCCL_NVLS_ENABLE": "0",
    }
    return {name: os.environ.get(name, value) for name, value in wanted.items()}
