"""A real server on an ephemeral port, in a thread, with a fake engine behind it."""

from __future__ import annotations

import asyncio
import contextlib
import pathlib
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import uvicorn

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from server_client import RunningServer
from server_fakes import ByteTokenizer, FakeEngine

from loongjax_server.app import create_app
from loongjax_server.config import ServerConfig
from loongjax_server.tokenizer import TextTokenizer


@contextlib.contextmanager
def running(engine: FakeEngine, tokenizer: TextTokenizer, config: ServerConfig) -> Iterator[RunningServer]:
    app = create_app(engine, tokenizer, config)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host="127.0.0.1",
            port=0,
            root_path=config.root_path,
            log_config=None,
            lifespan="on",
            ws="none",
            timeout_graceful_shutdown=1,
        )
    )
    is_ready = threading.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def main() -> None:
        loops.append(asyncio.get_running_loop())
        task = asyncio.create_task(server.serve())
        while not (server.started or task.done()):
            await asyncio.sleep(0.005)
        is_ready.set()
        await task

    thread = threading.Thread(target=asyncio.run, args=(main(),), daemon=True)
    thread.start()
    assert is_ready.wait(20)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield RunningServer(port=port, engine=engine, app=app, loop=loops[0])
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture
def serve() -> Iterator[Callable[..., RunningServer]]:
    """Starts servers: serve(engine, tokenizer=..., **settings)."""
    with contextlib.ExitStack() as stack:

        def start(engine: FakeEngine, tokenizer: TextTokenizer | None = None, **settings) -> RunningServer:
            return stack.enter_context(running(engine, tokenizer or ByteTokenizer(), ServerConfig(**settings)))

        yield start


@pytest.fixture(scope="session")
def shared_server() -> Iterator[RunningServer]:
    """One server with default settings, for all tests that need no other."""
    with running(FakeEngine(), ByteTokenizer(), ServerConfig()) as server:
        yield server


@pytest.fixture
def server(shared_server: RunningServer) -> RunningServer:
    """The shared server, its engine as new."""
    assert shared_server.engine.num_live == 0
    shared_server.engine.__init__()
    return shared_server
