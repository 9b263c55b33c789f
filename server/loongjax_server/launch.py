"""From settings to a server that runs: what can fail early fails before a model is loaded."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
import sys
from types import FrameType

from loongjax.config import EngineConfig
from loongjax.engine.async_engine import AsyncEngine
from loongjax.engine.child import LOG_FORMAT, CoreFactory
from loongjax.engine.process import EngineProcess
from loongjax.models.shipped import resolve_checkpoint
from loongjax.models.tokenizer import Tokenizer, load_tokenizer
from loongjax.runtime.environment import device_environment
from loongjax_server.config import ServerConfig
from loongjax_server.run import listen, serve

logger = logging.getLogger(__name__)


def launch(engine_config: EngineConfig, server_config: ServerConfig) -> None:
    """Serves until a signal comes. Before it serves, a signal ends the process: there is nothing to drain.

    Raises:
        ConfigError, CheckpointError: what cannot be served, and what would work.
        EngineDeadError: the engine could not be started.
        SystemExit, KeyboardInterrupt: a signal came before it served.
    """
    logging.basicConfig(level=server_config.log_level.upper(), format=LOG_FORMAT)
    signal.signal(signal.SIGTERM, _leave)
    server_config.check_outside()
    with listen(server_config) as listener:
        tokenizer = load_tokenizer(resolve_checkpoint(engine_config.checkpoint))
        asyncio.run(_serve(engine_config, server_config, tokenizer, listener))


async def _serve(
    engine_config: EngineConfig, server_config: ServerConfig, tokenizer: Tokenizer, listener: socket.socket
) -> None:
    factory = CoreFactory(engine_config, server_config.log_level)
    # At exit, the host ends its process by force if it still lives: one that loads a model listens to nothing else.
    host = EngineProcess(factory, environment=device_environment(engine_config))
    engine = AsyncEngine(host, tokenizer, seed=engine_config.seed)
    await engine.start()
    gc.collect()
    gc.freeze()  # a collection that looks at everything that was imported would hold up every stream for some 30 ms
    await serve(engine, tokenizer, server_config, listener)


def _leave(signum: int, frame: FrameType | None) -> None:
    logger.info("%s before anything was served: ending", signal.Signals(signum).name)
    sys.exit(128 + signum)
