"""`loongjax fit`: from measured points to the cost model that schedulers and the simulator reckon with."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

import tyro

from loongjax.costmodel.fit import LEAST_POINTS, fit
from loongjax.costmodel.measurement import Measurements
from loongjax.costmodel.model_file import save
from loongjax.costmodel.work import Strategy
from loongjax.errors import ConfigError
from loongjax_profiling.fit.report import format_report
from loongjax_profiling.iteration.database import Database
from loongjax_profiling.iteration.selection import choose_system, measurements_of
from loongjax_profiling.output import prepare_file


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitCommand:
    """Fits the analytical model to the points in a database, writes it, and prints how far it is off: in the paper's
    form and in the one that schedulers use, on the points it was fitted to and on points it has not seen."""

    db: pathlib.Path
    """Database of `loongjax profile iteration`."""
    out: pathlib.Path
    """File to write, for --cost-model."""
    device: str | None = None
    """Words of the device's name, where the database has points of several."""
    model: str | None = None
    """Words of the model's name and shape, where the database has points of several, for example "tiny 32-bit"."""


def main(argv: Sequence[str]) -> int:
    """Fits, writes and reports.

    Raises:
        ConfigError: no such database, nothing to fit, several systems of which one must be chosen, or a file that
            must not be written.
    """
    command = tyro.cli(FitCommand, prog="loongjax fit", args=argv)
    prepare_file(command.out, inputs={"--db": command.db})
    with Database(command.db) as database:
        system = choose_system(database, device=command.device, model=command.model)
        measured = measurements_of(database, system)
        num_failed = sum(point.error is not None for point in database.points(system))
    if num_failed:
        print(
            f"left out: {num_failed} points that failed; `loongjax profile iteration --retry-failed` tries them again"
        )
    enough, too_few = split_by_points(measured)
    for strategy, reason in too_few.items():
        print(f"left out: {strategy} has {reason}, and a fit needs {LEAST_POINTS} of each kind")
    if not (enough.prefills and enough.decodes):
        raise ConfigError(
            f"no strategy has {LEAST_POINTS} prefills and {LEAST_POINTS} decodes: "
            "`loongjax profile iteration --grid analytical-model` measures them"
        )
    model = fit(enough)
    save(model, command.out)
    print(f"{system}; {measured.provenance.hardware}, commit {measured.provenance.commit or 'unknown'}")
    print(format_report(model, enough))
    print(f"wrote {command.out}")
    return 0


def split_by_points(measured: Measurements) -> tuple[Measurements, dict[Strategy, str]]:
    """The points of strategies that have enough of them, and what the others have, in words."""
    too_few: dict[Strategy, str] = {}
    for strategy in sorted({point.strategy for point in (*measured.prefills, *measured.decodes)}):
        num_prefills = sum(point.strategy == strategy and not point.work.is_extend for point in measured.prefills)
        num_decodes = sum(point.strategy == strategy for point in measured.decodes)
        if min(num_prefills, num_decodes) < LEAST_POINTS:
            too_few[strategy] = f"{num_prefills} prefills and {num_decodes} decodes"
    enough = dataclasses.replace(
        measured,
        prefills=tuple(point for point in measured.prefills if point.strategy not in too_few),
        decodes=tuple(point for point in measured.decodes if point.strategy not in too_few),
    )
    return enough, too_few
