"""`loongjax simulate`: the engine and its scheduler on a virtual clock."""

from __future__ import annotations

import pathlib
import sys
import time
from collections.abc import Sequence

import tyro

from loongjax.errors import LoongjaxError
from loongjax_profiling.simulate.config import SimulateConfig


def main(argv: Sequence[str]) -> int:
    """Simulates, and writes records, metrics and a picture; `paper-zipf` and `paper-datasets` compare policies.

    Returns:
        The exit status.

    Raises:
        ConfigError: what cannot be simulated, and what would work.
    """
    match list(argv):
        case ["paper-zipf" | "paper-datasets" as figure, *rest]:
            from loongjax_profiling.simulate.paper import PaperConfig, run_paper  # here: `--help` needs none of this

            return run_paper(figure, tyro.cli(PaperConfig, prog=f"loongjax simulate {figure}", args=rest))
        case arguments:
            return run(tyro.cli(SimulateConfig, prog="loongjax simulate", args=arguments))


def run(config: SimulateConfig) -> int:
    """As `main`, of a configuration. Ctrl-C, or an error in the middle, keeps who has ended by then."""
    from loongjax.engine.client import EngineStats  # here: `--help` needs none of this
    from loongjax_profiling.elasticity import Elasticity
    from loongjax_profiling.output import prepare_file, prepare_folder
    from loongjax_profiling.records import RequestRecord
    from loongjax_profiling.simulate.assembly import assemble_system, make_workload, service_level
    from loongjax_profiling.simulate.report import FILES, write_report
    from loongjax_profiling.simulate.simulation import simulate
    from loongjax_profiling.simulate.timeline import Timeline

    system, workload, wish = assemble_system(config), make_workload(config, tell=print), service_level(config)
    middle_s = (workload[0].arrival_s + workload[-1].arrival_s) / 2.0
    inputs = {"--trace": config.trace, "--cost-model": config.cost_model, "--host": config.host}
    system.require_times(workload)
    prepare_folder(config.out, FILES, inputs=inputs)  # now: not after an hour of simulation
    if config.explain is not None:
        prepare_file(pathlib.Path(config.explain), "--explain", inputs=inputs)
    timeline = Timeline(begin_s=max(0.0, middle_s - config.timeline_s / 2.0), length_s=config.timeline_s)
    records: list[RequestRecord] = []
    stats: list[EngineStats] = []
    begin_s = time.perf_counter()
    try:
        simulate(
            system,
            workload,
            slo=lambda request: wish,
            on_span=timeline.note,
            on_record=records.append,
            on_end=stats.extend,
            progress=sys.stderr.isatty(),
        )
    except (KeyboardInterrupt, LoongjaxError):
        wall_s, elasticity = time.perf_counter() - begin_s, Elasticity.of(stats)
        write_report(config, system, records, elasticity, timeline, wall_s=wall_s, is_complete=False)
        print(f"stopped early: {config.out}/ has {len(records)} of {len(workload)} requests, those that ended first")
        raise
    write_report(config, system, records, Elasticity.of(stats), timeline, wall_s=time.perf_counter() - begin_s)
    return 0
