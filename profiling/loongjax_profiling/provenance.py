"""Where a measurement comes from."""

from __future__ import annotations

import shutil
import subprocess


def checked_out_commit() -> str | None:
    """What is checked out where the command runs, marked if files differ from it; None outside a repository."""
    if shutil.which("git") is None:
        return None
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() if found.returncode == 0 else None
