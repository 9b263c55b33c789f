"""`loongjax convert`: writes an Orbax checkpoint once, which `serve` restores onto any tp and number of instances."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

import tyro


@dataclasses.dataclass(frozen=True)
class ConvertCommand:
    """Converts a Hugging Face Llama checkpoint (safetensors) into an Orbax one, which `loongjax serve` restores."""

    checkpoint: tyro.conf.Positional[pathlib.Path]
    """Folder of the Hugging Face checkpoint."""
    out: tyro.conf.Positional[pathlib.Path]
    """Folder to write; it must not exist, or be empty."""


def main(argv: Sequence[str]) -> int:
    """Converts, and says where.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        ConfigError: the folder holds something, or cannot be written to.
    """
    command = tyro.cli(ConvertCommand, prog="loongjax convert", args=argv)
    from loongjax.models.orbax_checkpoint import convert  # here: `--help` needs no JAX

    convert(command.checkpoint, command.out)
    print(f"wrote {command.out}; serve it with: loongjax serve {command.out}")
    return 0
