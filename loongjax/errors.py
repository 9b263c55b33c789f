"""Every error that loongjax raises on purpose.

LoongjaxError
├── ConfigError             a setting, or a combination of settings, that cannot work
├── CheckpointError         a checkpoint that cannot be read or does not fit its configuration
├── RequestError            a request that is malformed
│   └── ContextLengthError  a prompt, or a prompt and its output, longer than the engine can ever hold
├── QueueFullError          the engine takes no more requests now; trying again later can work
└── EngineError             the engine itself failed
    └── EngineDeadError     the engine has stopped, or is draining, and accepts nothing
"""

from __future__ import annotations


class LoongjaxError(Exception):
    """The root of the tree."""


class ConfigError(LoongjaxError):
    """A setting that cannot work: the message says what was found, what was expected, and how to mend it.

    No ValueError, which command lines built from dataclasses take for a value of the wrong type.
    """


class CheckpointError(LoongjaxError):
    """A checkpoint that cannot be read, or does not fit its configuration: the message names the file or tensor."""


class RequestError(LoongjaxError, ValueError):
    """A malformed request.

    Args:
        message: what was found and what would work.
        param: the request's field at fault, if one is.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def __reduce__(self) -> tuple[type, tuple[str, str | None]]:
        return type(self), (self.message, self.param)


class ContextLengthError(RequestError):
    """More tokens than the engine can ever hold for one request."""


class QueueFullError(LoongjaxError):
    """The queue limit is reached.

    Args:
        message: how many requests wait.
        retry_after_s: when to try again, in seconds.
    """

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[type, tuple[str, float]]:
        return type(self), (self.message, self.retry_after_s)


class EngineError(LoongjaxError):
    """The engine failed while it served a request."""


class EngineDeadError(EngineError):
    """The engine has stopped, or is draining, and accepts nothing."""
