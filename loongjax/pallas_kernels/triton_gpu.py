"""What all Triton variants need to know of the GPU, and how they are called."""

from __future__ import annotations

import importlib.util

import jax

from loongjax.errors import ConfigError

HOPPER_NUM_PROCESSORS = 132


def num_multiprocessors() -> int:
    """Streaming multiprocessors of a GPU of this process; an H200's where there is none, for lowering alone."""
    gpu = _any_gpu()
    return HOPPER_NUM_PROCESSORS if gpu is None else int(gpu.core_count)


def compute_capability() -> int:
    """Such as 90 for Hopper; that of a GPU of this process, else Hopper's."""
    gpu = _any_gpu()
    return 90 if gpu is None else int(str(gpu.compute_capability).replace(".", ""))


def _any_gpu() -> jax.Device | None:
    device = jax.local_devices()[0]
    return device if device.platform == "gpu" else None


def require_triton(op: str) -> None:
    """Raises ConfigError if the packages that Triton variants need are not installed."""
    missing = [name for name in ("jax_triton", "triton") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{op}: implementation 'triton' needs the package {missing[0]!r}: pip install 'loongjax[gpu]' brings it"
        )
