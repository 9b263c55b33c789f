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
from loongjax_profiling.iteration.grids import default_shrink
from loongjax_profiling.iteration.selection import choose_system, measurements_of
from loongjax_profiling.output import prepare_file

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
    shrink: int | None = None
    """What `loongjax profile iteration` divided lengths by; None: its default, 1 on a GPU and 256 elsewhere."""
    device: str | None = None
    """Words of the device's name, where the database has points of several."""
    model: str | None = None
    """Words of the model's name and shape, where the database has points of several, for example "tiny 32-bit"."""

    def __post_init__(self) -> None:
        if self.shrink is not None and self.shrink < 1:
            raise ConfigError(f"--shrink must be at least 1, got {self.shrink}: leave it out for the default")


def main(argv: Sequence[str]) -> int:
    """Draws one figure.

    Raises:
        ConfigError: no such database, or it lacks the figure's points; the message says what measures them. Or a file
            that must not be written.
    """
    command = tyro.cli(PlotCommand, prog="loongjax plot", args=argv)
    # Here: they need matplotlib, and `--help` does not.
    from loongjax_profiling.plot import accuracy, scaling, sequence_parallelism, tensor_parallelism
    from loongjax_profiling.plot.times import Times

    prepare_file(command.out, inputs={"--db": command.db})
    with Database(command.db) as database:
        system = choose_system(database, device=command.device, model=command.model)
        runs = database.runs(system)
        num_devices = max(run.num_devices for run in runs)
        title = f"{runs[-1].model_name} on {num_devices} x {system.device}"
        measured = measurements_of(database, system)
        times = Times(
            seconds={p.case: p.timing.seconds for p in database.points(system) if p.timing is not None},
            system=title,
            num_devices=num_devices,
            shrink=command.shrink or default_shrink("cpu" if system.device == "cpu" else "gpu"),
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
            figure = accuracy.draw(enough, title)
    figure.savefig(command.out, format="png", dpi=150)
    print(f"wrote {command.out}")
    return 0
