"""Work that ends when its client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from starlette.types import Receive

from loongjax_server.errors import ClientDisconnectedError


async def until_disconnect[Result](receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled as soon as the client disconnects.

    The request's body must have been read. Both tasks are over when this returns or raises.

    Raises:
        ClientDisconnectedError: the client went away first.
    """
    work_task = asyncio.ensure_future(work)
    gone_task = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((work_task, gone_task), return_when=asyncio.FIRST_COMPLETED)
        if work_task.done():
            return work_task.result()
        raise ClientDisconnectedError
    finally:
        work_task.cancel()
        gone_task.cancel()
        await asyncio.gather(work_task, gone_task, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
