"""`loongjax serve`: the engine in a process of its own, and the HTTP server in this one."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import socket
from collections.abc import Sequence

import tyro

from loongjax.config import EngineConfig
from loongjax.engine.async_engine import AsyncEngine
from loongjax.engine.child import LOG_FORMAT, CoreFactory
from loongjax.engine.process import EngineProcess
from loongjax.models.shipped import resolve_checkpoint
from loongjax.models.tokenizer import Tokenizer, load_tokenizer
from loongjax.runtime.environment import device_environment
from loongjax_server.config import ServerConfig
from loongjax_server.run import listen, serve


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
    """
    command = tyro.cli(ServeCommand, prog="loongjax serve", args=argv)
    logging.basicConfig(level=command.server.log_level.upper(), format=LOG_FORMAT)
    with listen(command.server) as listener:
        tokenizer = load_tokenizer(resolve_checkpoint(command.engine.checkpoint))
        asyncio.run(_serve(command, tokenizer, listener))
    return 0


async def _serve(command: ServeCommand, tokenizer: Tokenizer, listener: socket.socket) -> None:
    factory = CoreFactory(command.engine, command.server.log_level)
    host = EngineProcess(factory, environment=device_environment(command.engine))
    engine = AsyncEngine(host, tokenizer, seed=command.engine.seed)
    await engine.start()
    await serve(engine, tokenizer, command.server, listener)
