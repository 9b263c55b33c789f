"""What a benchmark's results say of where they come from, and how they are kept."""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax

from loongjax_profiling.provenance import checked_out_commit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where results go, and what they are of."""
    parser.add_argument("--out", type=pathlib.Path, help="where to write the results, as JSON")
    parser.add_argument("--commit", default=None, help="of this code, where git cannot be asked")


def origin(benchmark: str, argv: Sequence[str] | None, commit: str | None) -> dict[str, Any]:
    """The command, and the commit as it is before anything is measured. Does not ask for devices.

    Args:
        benchmark: its name in this folder.
        argv: as its `main` was given it; None: the process' own.
        commit: of the code; None: git is asked.
    """
    return {
        "command": " ".join(["python -m benchmarks." + benchmark, *(sys.argv[1:] if argv is None else argv)]),
        "commit": commit or checked_out_commit(),
    }


def write(
    path: pathlib.Path | None, about: dict[str, Any], rows: Sequence[dict[str, Any]], *, num_devices: int | None = None
) -> None:
    """Writes what was measured, one row a line; nothing where there is no path.

    Args:
        path: of the JSON file.
        about: the `origin`, and what else holds for all rows.
        rows: one for each measurement.
        num_devices: how many were used; None: all.
    """
    if path is None:
        return
    devices = jax.devices()[:num_devices]
    about = about | {"hardware": f"{len(devices)} x {devices[0].device_kind}", "jax": jax.__version__}
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n  ".join(map(json.dumps, rows))
    path.write_text(json.dumps(about, indent=1).removesuffix("\n}") + f',\n "rows": [\n  {lines}\n ]\n}}\n')
