"""The small model that ships with loongjax, for when no checkpoint is named."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

SHIPPED_NAME = "needle"


def resolve_checkpoint(checkpoint: str | None) -> Path:
    """The named checkpoint's folder, or that of the model that ships."""
    if checkpoint is not None:
        return Path(checkpoint)
    return Path(str(importlib.resources.files("loongjax") / "checkpoints" / SHIPPED_NAME))
