"""`loongjax profile`: what this machine does, measured."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import Literal, get_args

import tyro

from loongjax.config import CPU_NUM_DEVICES, EngineConfig
from loongjax.errors import ConfigError
from loongjax.runtime.environment import device_environment
from loongjax_profiling.iteration.command import IterationCommand

Op = Literal["decode", "extend", "kv_update", "prefill", "exchange", "ring"]
USAGE = """usage: loongjax profile kernels|iteration [OPTIONS]

  kernels      time the ops, each beside its rival and its target
  iteration    time prefills, decode steps and migrations on all devices, for `loongjax fit` and `loongjax plot`
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelsCommand:
    """Times the ops, each beside its rival: a copy, cuDNN, tokamax, XLA's collectives, or an op over the same pairs.

    Exchanges and the ring need two devices or more, and take two, four and eight, as far as there are so many.

    Raises:
        ConfigError: a number that cannot work.
    """

    ops: tuple[Op, ...] = get_args(Op)
    """What to time."""
    shrink: int | None = None
    """Divides all lengths, but those of exchanges; None: 1 on a GPU, 256 elsewhere. Other than 1: no targets."""
    only: str = ""
    """Times only work whose description holds this."""
    implementation: str | None = None
    """Variant of every op; None: the fastest that there is for it."""
    num_cpu_devices: int = CPU_NUM_DEVICES
    """Virtual devices to make when there is no GPU."""
    out: pathlib.Path | None = None
    """JSON file for the rows; None: they are only printed."""
    commit: str | None = None
    """Of this code, for the JSON file; None: git is asked."""

    def __post_init__(self) -> None:
        if not self.ops:
            raise ConfigError(
                f"--ops names no op: give one or more of {', '.join(get_args(Op))}, or leave it out for all"
            )
        if self.shrink is not None and self.shrink < 1:
            raise ConfigError(f"--shrink must be at least 1, got {self.shrink}: leave it out for the full lengths")


def main(argv: Sequence[str]) -> int:
    """Runs one sub-command.

    Returns:
        2 for a wrong command line, 1 if anything could not be measured, else 0.

    Raises:
        ConfigError: what cannot be measured, and what would work.
    """
    match list(argv):
        case ["kernels", *rest]:
            command = tyro.cli(KernelsCommand, prog="loongjax profile kernels", args=rest)
            # Before JAX is imported.
            environment = device_environment(EngineConfig(num_cpu_devices=command.num_cpu_devices))
            del environment["XLA_PYTHON_CLIENT_MEM_FRACTION"]  # an engine's; copies are timed beside JAX's memory
            os.environ.update(environment)
            from loongjax_profiling.kernels.profile import profile_kernels

            return profile_kernels(command)
        case ["iteration", *rest]:
            iteration_command = tyro.cli(IterationCommand, prog="loongjax profile iteration", args=rest)
            # Before JAX is imported.
            os.environ.update(device_environment(iteration_command.engine_config(tp=1, max_num_batched_tokens=1)))
            from loongjax_profiling.iteration.profile import profile_iteration

            return profile_iteration(iteration_command, shlex.join(["loongjax", "profile", "iteration", *rest]))
        case ["-h" | "--help"]:
            print(USAGE)
            return 0
        case _:
            print(USAGE, file=sys.stderr)
            return 2
