"""What the handlers of one application share."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePath

from fastapi import Request

from loongjax.engine.client import EngineClient
from loongjax_server.config import ServerConfig
from loongjax_server.metrics import Metrics
from loongjax_server.token_text import TokenTexts
from loongjax_server.tokenizer import TextTokenizer
from loongjax_server.unsupported import UnsupportedFields


class ServerContext:
    """The engine, the tokenizer, and the server's own state. It lives in `app.state.context`."""

    def __init__(self, engine: EngineClient, tokenizer: TextTokenizer, config: ServerConfig) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.config = config
        self.model_name = config.served_model_name or PurePath(engine.info.checkpoint).name or engine.info.checkpoint
        self.api_key = config.resolve_api_key()
        self.chat_template = config.read_chat_template()
        self.metrics = Metrics(self.model_name)
        self.token_texts = TokenTexts(tokenizer)
        takes_tools = "tools" in self.chat_template if self.chat_template is not None else tokenizer.takes_tools
        self.unsupported_fields = UnsupportedFields(takes_tools=takes_tools)
        self.created_s = int(time.time())
        self.is_draining = False
        self._num_live = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._serial_numbers = itertools.count()
        self._executor: ThreadPoolExecutor | None = None

    @contextlib.contextmanager
    def threads(self) -> Generator[None, None, None]:
        """The threads of `off_loop`, for as long as the application lives."""
        self._executor = ThreadPoolExecutor(self.config.num_tokenizer_threads, "loongjax-tokenizer")
        try:
            yield
        finally:
            self._executor.shutdown(wait=False, cancel_futures=True)

    async def off_loop[**Params, Result](
        self, work: Callable[Params, Result], *args: Params.args, **kwargs: Params.kwargs
    ) -> Result:
        """Runs slow host work in a thread, so that streams do not stutter."""
        assert self._executor is not None, "the application's lifespan has not begun"
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, lambda: work(*args, **kwargs))

    def engine_request_id(self, response_id: str) -> str:
        """An id that is unique among live requests, whatever ids clients choose."""
        return f"{response_id}-{next(self._serial_numbers)}"

    def enter(self) -> None:
        """A request that draining must wait for has begun."""
        self._num_live += 1
        self._idle.clear()

    def leave(self) -> None:
        """Such a request is over."""
        self._num_live -= 1
        if self._num_live == 0:
            self._idle.set()

    async def drain(self, timeout_s: float) -> None:
        """Accepts nothing more and lets live requests finish; those left when time is over are aborted."""
        self.is_draining = True
        start_s = time.monotonic()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        await self.engine.drain(max(0.0, timeout_s - (time.monotonic() - start_s)))


def get_context(request: Request) -> ServerContext:
    """FastAPI dependency."""
    return request.app.state.context
