"""From a database to what the cost model fits: one system's points, as works with measured times."""

from __future__ import annotations

import collections

from loongjax.costmodel.measurement import DecodePoint, Measurements, MigrationPoint, PrefillPoint, Provenance
from loongjax.costmodel.work import DecodeWork
from loongjax.errors import ConfigError
from loongjax_profiling.iteration.case import Case
from loongjax_profiling.iteration.database import Database, Run, System
from loongjax_profiling.iteration.meter import Timing
from loongjax_profiling.iteration.placement import masters_of


def choose_system(database: Database, *, device: str | None = None, model: str | None = None) -> System:
    """The only system whose device, and whose model's name and shape, contain all of these words, whatever their case.

    Raises:
        ConfigError: there is none, or there are several.
    """
    names = {system: {run.model_name for run in database.runs(system)} for system in database.systems}
    models = {system: f"{', '.join(sorted(names[system]))}: {system.shape}" for system in names if names[system]}
    chosen = [system for system in models if _has_words(system.device, device) and _has_words(models[system], model)]
    if len(chosen) == 1:
        return chosen[0]
    known = "; ".join(f"{system.device} with {models[system]}" for system in models)
    if not known:
        raise ConfigError("the database has no points: `loongjax profile iteration` measures some")
    what = "several systems" if chosen else "no such system"
    raise ConfigError(
        f"the database has {what}; give --device and --model words that are of one of these alone: {known}"
    )


def measurements_of(database: Database, system: System) -> Measurements:
    """What succeeded. Prefills that scale down are left out: they do the work of others, and would count twice.

    Raises:
        ConfigError: a point that cannot be; the message names it.
    """
    prefills, decodes, migrations = [], [], []
    for point, run in database.points_and_runs(system):
        case, timing = point.case, point.timing
        if timing is None or case.scales_down:
            continue
        time = {"measured_s": timing.seconds}
        try:
            match case.kind:
                case "prefill" | "extend":
                    prefills.append(
                        PrefillPoint(strategy=case.strategy, work=case.prefill_work, padding=run.padding, **time)
                    )
                case "decode":
                    work = decode_work(case, timing)
                    decodes.append(DecodePoint(strategy=case.strategy, work=work, padding=run.padding, **time))
                case "migration":
                    migrations.append(MigrationPoint(tp=case.strategy.tp, num_tokens=case.input_len, **time))
        except ConfigError as error:
            raise ConfigError(f"{database.path}, {case}: {error}") from None
    return Measurements(
        provenance=_provenance(system, database.runs(system)),
        prefills=tuple(prefills),
        decodes=tuple(decodes),
        migrations=tuple(migrations),
    )


def _has_words(text: str, words: str | None) -> bool:
    return all(word in text.lower() for word in (words or "").lower().split())


def decode_work(case: Case, timing: Timing) -> DecodeWork:
    """With the keys that the instances had when it was measured."""
    rows = collections.Counter(masters_of(case))
    return DecodeWork(rows=tuple(rows[master] for master in range(case.num_masters)), keys=timing.keys)


def _provenance(system: System, runs: list[Run]) -> Provenance:
    commits = dict.fromkeys(run.commit for run in runs if run.commit is not None)
    return Provenance(
        hardware=f"{max((run.num_devices for run in runs), default=1)} x {system.device}",
        model=system.model,
        commit=", ".join(commits) or None,
    )
