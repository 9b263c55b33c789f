"""`loongjax plot`: the paper's figures, numbered as in its preprint, from measured points."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Literal

import tyro

from loongjax.errors import ConfigError
from loongjax_profiling.fit.command import split_by_points
from loongjax_profiling.iteration.database import Database
from loongjax_profiling.iteration.selection import choose_system, measurements_of

FigureName = Literal["2", "3", "13", "14"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlotCommand:
    """Draws a figure of the paper from a database of `loongjax profile iteration`.

    2: tensor parallelism of short and long requests. 3: sequence beside tensor parallelism. 13: the cost of scaling
    down and the gain of scaling up. 14: predicted and measured prefills. (Numbers of the preprint.)
    """

    figure: tyro.conf.Positional[FigureName]
    """Its number."""
    db: pathlib.Path
    """Database of `loongjax profile iteration`."""
    out: pathlib.Path
    """PNG file to write."""
    shrink: int = 1
    """What `loongjax profile iteration` divided lengths by; its default on a CPU is 256."""
    device: str | None = None
    """Part of the device's name, where the database has points of several."""
    model: str | None = None
    """Part of the model's name, where the database has points of several."""

    def __post_init__(self) -> None:
        if self.shrink < 1:
            raise ConfigError(f"--shrink must be at least 1, got {self.shrink}: leave it out for the full lengths")


def main(argv: Sequence[str]) -> int:
    """Draws one figure.

    Raises:
        ConfigError: no such database, or it lacks the figure's points; the message says what measures them.
    """
    command = tyro.cli(PlotCommand, prog="loongjax plot", args=argv)
    # Here: they need matplotlib, and `--help` does not.
    from loongjax_profiling.plot import accuracy, scaling, sequence_parallelism, tensor_parallelism
    from loongjax_profiling.plot.times import Times

    with Database(command.db) as database:
        system = choose_system(database, device=command.device, model=command.model)
        runs = database.runs(system)
        num_devices = max(run.num_devices for run in runs)
        title = f"{runs[-1].model_name} on {num_devices} x {system.device}"
        measured, padding = measurements_of(database, system)
        times = Times(
            seconds={p.case: p.timing.seconds for p in database.points(system) if p.timing is not None},
            system=title,
            num_devices=num_devices,
            shrink=command.shrink,
        )
    match command.figure:
        case "2":
            figure = tensor_parallelism.draw(times)
        case "3":
            figure = sequence_parallelism.draw(times)
        case "13":
            figure = scaling.draw(times)
        case "14":
            enough, _ = split_by_points(measured)
            figure = accuracy.draw(enough, padding, title)
    command.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(command.out, format="png", dpi=150)
    print(f"wrote {command.out}")
    return 0
