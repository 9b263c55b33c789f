"""Serving until a signal comes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Generator

import uvicorn
from fastapi import FastAPI

from loongjax.engine.client import EngineClient
from loongjax.errors import ConfigError
from loongjax_server.app import create_app
from loongjax_server.config import ServerConfig
from loongjax_server.context import ServerContext
from loongjax_server.tokenizer import TextTokenizer

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_FLUSH_TIMEOUT_S = 5
"""After the drain, how long slow readers have to take what was already written, in seconds."""


def listen(config: ServerConfig) -> socket.socket:
    """A socket bound to the configured address, so that a busy port shows before a model is loaded.

    Raises:
        ConfigError: the address is in use, or none of this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with contextlib.ExitStack() as on_error:
            listener = on_error.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            on_error.pop_all()
            return listener
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {config.host}:{config.port} ({error.strerror}): choose another --host or --port"
        ) from error


async def serve(
    engine: EngineClient, tokenizer: TextTokenizer, config: ServerConfig, listener: socket.socket | None = None
) -> None:
    """Serves a started engine, on its loop, until SIGTERM or SIGINT; then drains it, closes it and returns.

    After the first signal new requests get a 503, on new connections too, and live ones have `drain_timeout_s` to
    finish; then the listening socket closes. The second signal ends the process at once.

    Args:
        engine: closed at the end, whatever happens.
        tokenizer: of its model.
        config: the server's settings.
        listener: from `listen`; None: it is made here.
    """
    try:
        app = create_app(engine, tokenizer, config)
        server = DrainingServer(_uvicorn_config(app, config), app.state.context)
        await server.serve(sockets=[listener or listen(config)])
    finally:
        await engine.close()


def _uvicorn_config(app: FastAPI, config: ServerConfig) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        host=config.host,
        port=config.port,
        root_path=config.root_path,
        log_config=None,
        log_level=config.log_level,
        access_log=config.access_log,
        server_header=False,
        lifespan="on",
        ws="none",
        timeout_keep_alive=config.keep_alive_timeout_s,
        timeout_graceful_shutdown=_FLUSH_TIMEOUT_S,
    )


class DrainingServer(uvicorn.Server):
    """A uvicorn server that lets live requests finish before it shuts down."""

    def __init__(self, config: uvicorn.Config, context: ServerContext) -> None:
        super().__init__(config)
        self._context = context
        self._drain_task: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Says where it listens once it does."""
        await super().startup(sockets)
        for listener in sockets or [] if self.started else []:
            host, port = listener.getsockname()[:2]
            logger.info("ready: http://%s:%d/v1 serves %s", host, port, self._context.model_name)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Takes the signals while it serves, if it runs in the main thread, which alone may."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        for signum in SIGNALS:
            loop.add_signal_handler(signum, self.on_signal, signum)
        try:
            yield
        finally:
            for signum in SIGNALS:
                loop.remove_signal_handler(signum)

    def on_signal(self, signum: int) -> None:
        """Drains at the first signal; ends the process at the second."""
        if self._drain_task is not None:
            logger.warning("second signal: ending at once")
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
            return
        logger.info("draining: live requests have %g s to finish", self._context.config.drain_timeout_s)
        self._drain_task = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        try:
            if self.started:
                await self._context.drain(self._context.config.drain_timeout_s)
        finally:
            self.should_exit = True
