"""What passes between a front end and the step loop, in another thread or another process. All of it pickles."""

from __future__ import annotations

import dataclasses

from loongjax.core.request import Request, RequestEvent
from loongjax.engine.client import EngineStats, ModelInfo
from loongjax.errors import LoongjaxError


@dataclasses.dataclass(frozen=True)
class AddRequests:
    """Take all of these requests, or none. Answered by a `Reply`."""

    call_id: int
    requests: tuple[Request, ...]


@dataclasses.dataclass(frozen=True)
class AbortRequests:
    """End these requests; those that are over already are passed over. Their last events follow."""

    request_ids: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class GetStats:
    """Answered by a `Reply` from between two steps, and so by a sound step loop only."""

    call_id: int


@dataclasses.dataclass(frozen=True)
class CheckHealth:
    """Answered by a `Reply` from between two steps, with an error if an iteration is overdue."""

    call_id: int


@dataclasses.dataclass(frozen=True)
class Stop:
    """End the loop at once, whatever is in flight. `Died` follows."""


ToEngine = AddRequests | AbortRequests | GetStats | CheckHealth | Stop


@dataclasses.dataclass(frozen=True)
class Ready:
    """The engine is built and takes requests. The first message, unless it is `Died`."""

    info: ModelInfo


@dataclasses.dataclass(frozen=True)
class Reply:
    """The answer to a call: what it asked for, or the error it ended in."""

    call_id: int
    stats: EngineStats | None = None
    error: LoongjaxError | None = None


@dataclasses.dataclass(frozen=True)
class Events:
    """News of requests, in order."""

    events: tuple[RequestEvent, ...]


@dataclasses.dataclass(frozen=True)
class Died:
    """The last message: the engine could not be built, failed, or was stopped. No request lives on."""

    error: LoongjaxError


FromEngine = Ready | Reply | Events | Died
