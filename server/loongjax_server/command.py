"""`loongjax serve`: the engine in a process of its own, and the HTTP server in this one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import tyro

from loongjax.config import EngineConfig
from loongjax_server.config import ServerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeCommand:
    """Serves a Llama checkpoint over an OpenAI-compatible HTTP API."""

    engine: tyro.conf.OmitArgPrefixes[EngineConfig] = dataclasses.field(default_factory=EngineConfig)
    server: tyro.conf.OmitArgPrefixes[ServerConfig] = dataclasses.field(default_factory=ServerConfig)


def main(argv: Sequence[str]) -> int:
    """Serves until a signal comes. Returns 0 if that ended it.

    Raises:
        ConfigError, CheckpointError: what cannot be served, and what would work.
        EngineDeadError: the engine could not be started.
        SystemExit, KeyboardInterrupt: a signal came before it served; the status is 143 for SIGTERM.
    """
    command = tyro.cli(ServeCommand, prog="loongjax serve", args=argv)
    from loongjax_server.launch import launch  # here: `--help` and a wrong flag need neither FastAPI nor an engine

    launch(command.engine, command.server)
    return 0
