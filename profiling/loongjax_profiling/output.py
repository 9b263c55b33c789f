"""Files that a command is told to write: whether they can be, before hours of work are done for them."""

from __future__ import annotations

import os
import pathlib

from loongjax.errors import ConfigError


def prepare_file(path: pathlib.Path, flag: str = "--out") -> None:
    """Makes the folder of a file that will be written, and leaves the file itself alone.

    Raises:
        ConfigError: it could not be written; the message names the flag that asked for it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{flag} {path} cannot be written: {error}") from None
    if path.is_dir():
        raise ConfigError(f"{flag} {path} is a folder: give the path of a file")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{flag} {path} cannot be written: permission denied")
    if path.exists():
        return
    try:
        # Some folders, such as /proc, take no files whatever their permissions say.
        path.open("xb").close()
        path.unlink()
    except OSError as error:
        raise ConfigError(f"{flag} {path} cannot be written: {error.strerror}") from None
