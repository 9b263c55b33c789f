"""Where a measurement comes from."""

from __future__ import annotations

import pathlib
import shutil
import subprocess


def checked_out_commit(file: pathlib.Path = pathlib.Path(__file__)) -> str | None:
    """The commit that this code is of, marked if files differ from it, wherever the command runs.

    None if it is in no repository, or only lies in one of others, as installed packages may.

    Args:
        file: one of the code's.
    """
    if shutil.which("git") is None or _git(file, "ls-files", "--error-unmatch", file.name) is None:
        return None
    return _git(file, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty")


def _git(file: pathlib.Path, *arguments: str) -> str | None:
    """What git says about the file's repository; None if it fails."""
    command = ["git", "-C", str(file.resolve().parent), *arguments]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() if found.returncode == 0 else None
