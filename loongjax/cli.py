"""The `loongjax` command. It loads only the sub-command that is asked for, so `--help` costs nothing."""

from __future__ import annotations

import importlib.metadata
import os
import select
import sys
from collections.abc import Sequence
from typing import TextIO

from loongjax.errors import LoongjaxError

COMMANDS_GROUP = "loongjax.commands"
"""The entry points that are sub-commands: each names a function that takes the remaining arguments."""

INTERRUPTED = 130
"""The exit status that shells give to a process which SIGINT ended."""

NO_READER = 141
"""The exit status that shells give to a process which SIGPIPE ended."""

_SUMMARIES = {
    "convert": "write a checkpoint anew, to be restored onto any number of devices",
    "fit": "fit the cost model to measured points",
    "plot": "draw the paper's figures from measured points",
    "profile": "time kernels, or the engine's iterations",
    "replay": "play a workload on the real engine beside its simulation",
    "serve": "serve a checkpoint over an OpenAI-compatible HTTP API",
    "simulate": "run the engine and its scheduler on a virtual clock",
}
"""What the project's own commands do: to ask them would mean to load them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one sub-command.

    Args:
        argv: the arguments; None takes the process's.

    Returns:
        The exit status: 2 for a wrong command line, 1 for an error that loongjax explains, 130 for Ctrl-C, 141 if
        nobody reads what is printed any more.
    """
    try:
        try:
            return _run(list(sys.argv[1:] if argv is None else argv))
        finally:
            sys.stdout.flush()  # here, where an error can still be caught
    except BrokenPipeError:
        if not _has_lost_its_reader(sys.stdout):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at exit
        return NO_READER


def _run(arguments: Sequence[str]) -> int:
    commands = {point.name: point for point in importlib.metadata.entry_points(group=COMMANDS_GROUP)}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage(sorted(commands)))
        return 0
    if arguments[0] == "--version":
        print(importlib.metadata.version("loongjax"))
        return 0
    name, *rest = arguments
    if name not in commands:
        print(f"loongjax: no command {name!r}\n\n{_usage(sorted(commands))}", file=sys.stderr)
        return 2
    try:
        return commands[name].load()(rest) or 0
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("loongjax"):
            raise
        print(
            f"loongjax {name} needs the package {error.name!r}: pip install 'loongjax[all]' brings it", file=sys.stderr
        )
        return 1
    except LoongjaxError as error:
        print(f"loongjax {name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"loongjax {name}: interrupted", file=sys.stderr)
        return INTERRUPTED


def _usage(commands: Sequence[str]) -> str:
    return "\n".join(
        [
            "usage: loongjax COMMAND [OPTIONS]      (loongjax COMMAND --help explains one)",
            "",
            "commands:",
            *(f"  {name:10} {_SUMMARIES.get(name, '')}".rstrip() for name in commands),
        ]
    )


def _has_lost_its_reader(stream: TextIO) -> bool:
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
