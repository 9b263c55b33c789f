"""`loongjax simulate`: the engine and its scheduler on a virtual clock."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import tyro

from loongjax.errors import ConfigError
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
    """As `main`, of a configuration."""
    from loongjax_profiling.metrics import ServingMetrics  # here: `--help` needs none of this
    from loongjax_profiling.provenance import checked_out_commit
    from loongjax_profiling.records import write_records
    from loongjax_profiling.simulate.assembly import assemble_system, make_workload, service_level
    from loongjax_profiling.simulate.report import describe, summary, write_metrics
    from loongjax_profiling.simulate.simulation import simulate
    from loongjax_profiling.simulate.timeline import Timeline

    system, workload, wish = assemble_system(config), make_workload(config), service_level(config)
    middle_s = workload[-1].arrival_s / 2.0
    try:
        config.out.mkdir(parents=True, exist_ok=True)  # now: not after an hour of simulation
    except OSError as error:
        raise ConfigError(f"--out {config.out} cannot be made: {error}") from None
    timeline = Timeline(begin_s=max(0.0, middle_s - config.timeline_s / 2.0), length_s=config.timeline_s)
    begin_s = time.perf_counter()
    records = simulate(
        system,
        workload,
        slo=lambda request: wish,
        on_span=timeline.note,
        progress=sys.stderr.isatty(),
    )
    wall_s = time.perf_counter() - begin_s
    metrics = ServingMetrics.of(records)
    write_records(records, config.out / "records.jsonl")
    about = describe(config) | {"cost_model_source": system.cost_model.source, "commit": checked_out_commit()}
    write_metrics(metrics, about, config.out / "metrics.json")
    if config.timeline_s > 0.0:
        timeline.draw(config.out / "timeline.png", title=f"{config.policy} on {system.cluster.num_instances} instances")
    print(summary(metrics))
    print(f"simulated in {wall_s:.1f} s, {metrics.duration_s / max(wall_s, 1e-9):.1f} times real time; {config.out}/")
    return 0
