"""`loongjax replay`: is the simulator right about this machine?"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence

import tyro

from loongjax.runtime.environment import device_environment
from loongjax_profiling.replay.config import ReplayConfig


def main(argv: Sequence[str]) -> int:
    """Plays, simulates, compares, and writes it all down.

    Returns:
        1 if a request failed, else 0.

    Raises:
        ConfigError: what cannot be replayed, and what would work.
        EngineError: the engine failed.
    """
    config = tyro.cli(ReplayConfig, prog="loongjax replay", args=list(argv))
    os.environ.update(device_environment(config))  # before JAX is imported
    from loongjax_profiling.replay.replay import replay

    return replay(config, shlex.join(["loongjax", "replay", *argv]))
