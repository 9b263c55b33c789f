"""A step loop in a process of its own, so that no Python work of the front end can slow its steps."""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from loongjax.engine.channel import Channel
from loongjax.engine.loop import EngineFactory, Inbox, serve_engine
from loongjax.engine.messages import Died, FromEngine, Stop, ToEngine
from loongjax.errors import EngineDeadError

logger = logging.getLogger(__name__)

FLUSH_TIMEOUT_S = 5.0


class EngineProcess:
    """Implements `loongjax.engine.loop.EngineHost` over a child process.

    The child is spawned, not forked. It ends when this process does, however that happens; and if the child ends first,
    however that happens, `Died` is said at once. The child takes no notice of SIGINT and SIGTERM, which terminals and
    service managers send to every process of a service: this process decides when it stops.
    """

    def __init__(self, factory: EngineFactory, *, environment: Mapping[str, str] | None = None) -> None:
        """An engine to be built in a child.

        Args:
            factory: picklable; unpickled in the child, after the environment is set.
            environment: variables for the child, such as JAX_NUM_CPU_DEVICES, set before anything imports jax there.
        """
        self._pickled_factory = pickle.dumps(factory)
        self._environment = dict(environment or {})
        self._process: SpawnProcess | None = None
        self._channel: Channel | None = None
        self._on_message: Callable[[FromEngine], None] | None = None
        self._has_died = False

    @property
    def pid(self) -> int | None:
        """The child's process id, once started."""
        return self._process.pid if self._process is not None else None

    def start(self, on_message: Callable[[FromEngine], None]) -> None:
        assert self._process is None, "an engine is started once"
        context = multiprocessing.get_context("spawn")
        ours, childs = context.Pipe(duplex=True)
        self._on_message = on_message
        self._process = context.Process(
            target=_child_main,
            args=(childs, self._environment, self._pickled_factory),
            name="loongjax-engine",
            daemon=True,
        )
        self._process.start()
        childs.close()
        # multiprocessing ends daemons with SIGTERM at exit and waits for them, but this one does not listen to it.
        atexit.register(self._process.kill)
        self._channel = Channel(
            ours, peer_sentinel=self._process.sentinel, on_message=self._take, on_end=self._child_is_gone
        )

    def send(self, message: ToEngine) -> None:
        assert self._channel is not None, "the engine is not started"
        self._channel.send(message)

    def stop(self, timeout_s: float) -> None:
        if self._process is None or self._channel is None:
            return
        self._channel.send(Stop())
        if not self._channel.join(timeout_s):
            logger.warning("the engine's process did not end within %.1f s and is killed", timeout_s)
            self._process.kill()
            self._channel.join(None)

    def _take(self, message: FromEngine) -> None:
        assert self._on_message is not None
        self._has_died |= isinstance(message, Died)
        self._on_message(message)

    def _child_is_gone(self) -> None:
        assert self._process is not None
        self._process.join()
        atexit.unregister(self._process.kill)
        if not self._has_died:
            exit_code = self._process.exitcode
            self._take(Died(EngineDeadError(f"the engine's process ended unexpectedly, with exit code {exit_code}")))


def _child_main(connection: Connection, environment: dict[str, str], pickled_factory: bytes) -> None:
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    inbox = Inbox()
    channel = Channel(connection, peer_sentinel=parent.sentinel, on_message=inbox.put, on_end=_leave)
    serve_engine(lambda: pickle.loads(pickled_factory)(), inbox, channel.send)
    channel.flush(FLUSH_TIMEOUT_S)


def _leave() -> None:
    """Ends the child: nobody is left to work for, and the step loop may be deep in a compilation."""
    os._exit(1)
