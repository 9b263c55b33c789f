"""Arguments of command lines that can work, or a word on why not."""

from __future__ import annotations

import argparse
from pathlib import Path

from needle.prompts import MIN_PROMPT_TOKENS


def count(text: str) -> int:
    """How many of something of which there must be one."""
    return _at_least(1, text)


def prompt_length(text: str) -> int:
    """Tokens of a prompt that can hold a key and the question for it."""
    return _at_least(MIN_PROMPT_TOKENS, text)


def existing_path(text: str) -> Path:
    """A file or folder that is there."""
    path = Path(text)
    if not path.exists():
        raise argparse.ArgumentTypeError(f"there is no {path}")
    return path


def path_in_folder(text: str) -> Path:
    """A file that can be written into a folder that is there."""
    path = Path(text)
    if not path.parent.is_dir() or path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is no file in a folder that exists")
    return path


def _at_least(least: int, text: str) -> int:
    number = int(text)
    if number < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, got {number}")
    return number
