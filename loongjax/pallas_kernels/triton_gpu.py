"""What all Triton variants need to know of the GPU, and how they are called."""

from __future__ import annotations

import functools
import importlib.util
import logging

import jax

from loongjax.errors import ConfigError

logger = logging.getLogger(__name__)

HOPPER_NUM_PROCESSORS = 132
LEAST_MAJOR = 8
"""Ampere's compute capability: the oldest GPUs that Triton compiles for, and whose shared memory the blocks fit."""


SHARED_KIB = {80: 164, 86: 100, 87: 164, 89: 100, 90: 228, 100: 228, 103: 228, 120: 100}
"""Shared memory of a multiprocessor by compute capability: CUDA C++ Programming Guide, technical specifications."""


def num_multiprocessors() -> int:
    """Streaming multiprocessors of a GPU of this process; an H200's where there is none, for lowering alone."""
    gpu = _any_gpu()
    return HOPPER_NUM_PROCESSORS if gpu is None else int(gpu.core_count)


def compute_capability() -> int:
    """Such as 90 for Hopper; that of a GPU of this process, else Hopper's."""
    gpu = _any_gpu()
    return 90 if gpu is None else int(str(gpu.compute_capability).replace(".", ""))


def shared_memory_bytes() -> int:
    """Of one multiprocessor of a GPU of this process, else of an H200's; of an unknown one, the least of all."""
    return SHARED_KIB.get(compute_capability(), min(SHARED_KIB.values())) << 10


def _missing_packages() -> list[str]:
    return [name for name in ("jax_triton", "triton") if importlib.util.find_spec(name) is None]


def _any_gpu() -> jax.Device | None:
    device = jax.local_devices()[0]
    return device if device.platform == "gpu" else None


@functools.cache
def is_triton_usable() -> bool:
    """Whether there is an NVIDIA GPU from Ampere on, and the packages that Triton variants need; told once if not."""
    gpu = _any_gpu()
    if gpu is None:
        return False
    capability = str(getattr(gpu, "compute_capability", ""))
    major = capability.partition(".")[0]
    if not major.isdigit() or int(major) < LEAST_MAJOR:
        logger.warning("no Triton kernels for compute capability %r, so slower variants are used", capability)
        return False
    return is_triton_installed()


@functools.cache
def is_triton_installed() -> bool:
    """Whether the packages that Triton variants need are here; told once if not."""
    missing = _missing_packages()
    if missing:
        logger.warning("%s is not installed, so slower variants are used: pip install 'loongjax[gpu]'", missing[0])
    return not missing


def require_triton(op: str, what: str = "implementation 'triton'") -> None:
    """Raises ConfigError, which says what needs them, if the packages of Triton variants are not installed."""
    if missing := _missing_packages():
        raise ConfigError(f"{op}: {what} needs the package {missing[0]!r}: pip install 'loongjax[gpu]' brings it")
