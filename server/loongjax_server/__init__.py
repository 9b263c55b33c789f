"""The OpenAI-compatible HTTP server of loongjax.

The names below load on first use, so that `loongjax serve --help` stays fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loongjax_server.app import create_app as create_app
    from loongjax_server.config import ServerConfig as ServerConfig
    from loongjax_server.run import serve as serve

_HOMES = {
    "ServerConfig": "loongjax_server.config",
    "create_app": "loongjax_server.app",
    "serve": "loongjax_server.run",
}

__all__ = ["ServerConfig", "create_app", "serve"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
