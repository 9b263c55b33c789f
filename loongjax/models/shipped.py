"""The small model that ships with loongjax, for when no checkpoint is named."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from loongjax.errors import ConfigError

SHIPPED_NAME = "needle"


def resolve_checkpoint(checkpoint: str | None) -> Path:
    """The named checkpoint's folder, or that of the model that ships.

    Raises:
        ConfigError: none is named, and this installation has none to ship.
    """
    if checkpoint is not None:
        return Path(checkpoint)
    shipped = Path(str(importlib.resources.files("loongjax") / "checkpoints" / SHIPPED_NAME))
    if not (shipped / "config.json").is_file():
        raise ConfigError(
            "no checkpoint is named, and this installation of loongjax holds none of its own: "
            "give the folder of a Llama checkpoint in Hugging Face format"
        )
    return shipped
