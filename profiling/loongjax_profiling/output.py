"""Files that a command is told to write: whether they can be, before hours of work are done for them."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence

from loongjax.errors import ConfigError

SQLITE_MAGIC = b"SQLite format 3\0"
"""What a database begins with."""
Inputs = Mapping[str, str | pathlib.Path | None]
"""Files that a command reads, by the flags that name them; None: the flag was left out."""


def prepare_file(path: pathlib.Path, flag: str = "--out", *, inputs: Inputs | None = None) -> None:
    """Makes the folder of a file that will be written, and leaves the file itself alone.

    Raises:
        ConfigError: it could not be written, or what cannot be had again would be lost: a file that the command reads,
            or a database; the message names the flag that asked for it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{flag} {path} cannot be written: {error}") from None
    if path.is_dir():
        raise ConfigError(f"{flag} {path} is a folder: give the path of a file")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{flag} {path} cannot be written: permission denied")
    for other, read in (inputs or {}).items():
        if read is not None and path.exists() and os.path.exists(read) and path.samefile(read):
            raise ConfigError(f"{flag} {path} is the file of {other}, which would be lost: give {flag} another one")
    if _is_database(path):
        raise ConfigError(f"{flag} {path} is an SQLite database, which would be lost: give the path of another file")
    if path.exists():
        return
    try:
        # Some folders, such as /proc, take no files whatever their permissions say.
        path.open("xb").close()
        path.unlink()
    except OSError as error:
        raise ConfigError(f"{flag} {path} cannot be written: {error.strerror}") from None


def prepare_folder(
    path: pathlib.Path, names: Sequence[str], flag: str = "--out", *, inputs: Inputs | None = None
) -> None:
    """Makes a folder in which files of these names will be written, as `prepare_file` does for each of them.

    Raises:
        ConfigError: as `prepare_file`.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{flag} {path} cannot be made: {error}") from None
    for name in names:
        prepare_file(path / name, flag, inputs=inputs)


def _is_database(path: pathlib.Path) -> bool:
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return file.read(len(SQLITE_MAGIC)) == SQLITE_MAGIC
    except OSError:
        return False
