"""LLM serving for long and uneven contexts, on elastic sequence parallelism.

The names below load on first use, so that `import loongjax` and the command line stay fast.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loongjax.core.request import ServiceLevel as ServiceLevel
    from loongjax.core.sampling import SamplingParams as SamplingParams
    from loongjax.engine.llm import LLM as LLM

    __version__: str

_HOMES = {
    "LLM": "loongjax.engine.llm",
    "SamplingParams": "loongjax.core.sampling",
    "ServiceLevel": "loongjax.core.request",
}

__all__ = ["LLM", "SamplingParams", "ServiceLevel"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version("loongjax")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
