"""What the host of a real engine adds, from the file in which a replay wrote it down."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib

from loongjax.errors import ConfigError
from loongjax.runtime.simulated import HostTimes


def read_host_times(path: pathlib.Path) -> HostTimes:
    """Under "host" in a replay's comparison.json.

    Raises:
        ConfigError: no such file, or none of a replay.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"--host {path} cannot be read: {error}; `loongjax replay` writes a comparison.json"
        ) from None
    names = [field.name for field in dataclasses.fields(HostTimes)]
    host = content.get("host") if isinstance(content, dict) else None
    if isinstance(host, dict):
        host = {"prefill_begin_s": 0.0, **host}  # older files have it in the times of prefills
    if not isinstance(host, dict) or sorted(host) != sorted(names):
        raise ConfigError(f'--host {path} has no "host" with {", ".join(names)}: give the comparison.json of a replay')
    for name, value in host.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value < math.inf:
            raise ConfigError(f"--host {path}: {name} must be a number of seconds, not negative, got {value!r}")
    return HostTimes(**host)
