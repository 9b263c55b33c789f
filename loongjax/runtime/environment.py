"""What XLA must be told before it starts. Imports no JAX: a parent process prepares a child's environment with it."""

from __future__ import annotations

import os

from loongjax.config import EngineConfig


def device_environment(config: EngineConfig) -> dict[str, str]:
    """Environment variables that must be set before JAX starts its back end.

    Those that say what a setting says follow the setting, if it differs from its default; the others stay as they are.
    """
    wanted = {
        # XLA's CPU client sizes its thread pool by this, and collectives can deadlock in a small one.
        "NPROC": "32",
        # One process drives many GPUs: NCCL must launch on each in the order in which its lane dispatches.
        "NCCL_LAUNCH_ORDER_IMPLICIT": "1",
        # NVLink multicast can take GPUs that others share out of service.
        "NCCL_NVLS_ENABLE": "0",
    }
    environment = {name: os.environ.get(name, value) for name, value in wanted.items()}
    for name, field in _SETTINGS.items():
        setting = getattr(config, field)
        is_default = setting == getattr(EngineConfig(), field)
        environment[name] = os.environ.get(name, str(setting)) if is_default else str(setting)
    return environment


_SETTINGS = {"JAX_NUM_CPU_DEVICES": "num_cpu_devices", "XLA_PYTHON_CLIENT_MEM_FRACTION": "memory_fraction"}
