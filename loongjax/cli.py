"""The `loongjax` command. It loads only the sub-command that is asked for, so `--help` costs nothing."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Sequence

from loongjax.errors import LoongjaxError

COMMANDS_GROUP = "loongjax.commands"
"""The entry points that are sub-commands: each names a function that takes the remaining arguments."""

INTERRUPTED = 130
"""The exit status that shells give to a process which SIGINT ended."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one sub-command.

    Args:
        argv: the arguments; None takes the process's.

    Returns:
        The exit status: 2 for a wrong command line, 1 for an error that loongjax explains, 130 for Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
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
            *(f"  {name}" for name in commands),
        ]
    )
