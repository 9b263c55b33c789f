"""What a simulation leaves behind: records, metrics and a picture, and a few lines to read."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from loongjax.costmodel.model import FittedModel
from loongjax_profiling.elasticity import Elasticity
from loongjax_profiling.json_file import write_json
from loongjax_profiling.metrics import Distribution, ServingMetrics
from loongjax_profiling.provenance import checked_out_commit
from loongjax_profiling.records import RequestRecord, write_records
from loongjax_profiling.simulate.cluster import roofline_of
from loongjax_profiling.simulate.config import SimulateConfig
from loongjax_profiling.simulate.simulation import SimulatedSystem, in_order_of_arrival
from loongjax_profiling.simulate.timeline import Timeline

FILES = ("records.jsonl", "metrics.json", "timeline.png")


def write_report(
    config: SimulateConfig,
    system: SimulatedSystem,
    records: Sequence[RequestRecord],
    elasticity: Elasticity,
    timeline: Timeline,
    *,
    wall_s: float,
    is_complete: bool = True,
) -> None:
    """Writes the files, and prints the lines.

    Args:
        config: what was asked for.
        system: that served.
        records: of those who have ended, in any order.
        elasticity: what decode groups did.
        timeline: to be drawn, unless `config` wants none.
        wall_s: how long the simulation took.
        is_complete: whether these are all requests of the workload.
    """
    records = in_order_of_arrival(records)
    metrics = ServingMetrics.of(records)
    write_records(records, config.out / "records.jsonl")
    about = describe(config) | _source(config, system) | {"is_complete": is_complete, "commit": checked_out_commit()}
    write_metrics(metrics, elasticity, about, config.out / "metrics.json")
    if config.timeline_s > 0.0:
        timeline.draw(config.out / "timeline.png", title=f"{config.policy} on {system.cluster.num_instances} instances")
    print(f"{summary(records)}\n{elasticity}")
    print(f"simulated in {wall_s:.1f} s, {metrics.duration_s / max(wall_s, 1e-9):.1f} times real time; {config.out}/")


def write_metrics(metrics: ServingMetrics, elasticity: Elasticity, about: dict[str, Any], path: pathlib.Path) -> None:
    """One JSON object: the metrics, and under "about" where they come from."""
    write_json(metrics.as_json() | dataclasses.asdict(elasticity) | {"about": about}, path)


def describe(config: Any) -> dict[str, Any]:
    """A configuration as JSON: what was asked for."""
    return {name: value if not isinstance(value, pathlib.Path) else str(value) for name, value in _items(config)}


def summary(records: Sequence[RequestRecord]) -> str:
    """The metrics of these in lines of text, and why the first one failed that did."""
    metrics = ServingMetrics.of(records)
    rows = [
        ("per token", metrics.per_token_latency_s),
        ("per input token", metrics.input_token_latency_s),
        ("per output token", metrics.output_token_latency_s),
        ("to first token", metrics.ttft_s),
        ("whole request", metrics.latency_s),
    ]
    errors = [record.error for record in records if record.error is not None]
    has_wishes = any(record.ttft_slo_s is not None or record.tpot_slo_s is not None for record in records)
    goodput = (
        f"{100.0 * metrics.slo_attainment:.2f} % met their wishes: goodput {metrics.goodput:.3f} requests a second"
    )
    lines = [
        f"{metrics.num_requests} requests in {metrics.duration_s:.1f} s, {metrics.num_failed} failed: "
        f"{metrics.request_throughput:.3f} requests, {metrics.input_throughput:.0f} prompt tokens and "
        f"{metrics.output_throughput:.0f} generated tokens a second",
        *[f"the first that failed: {error}" for error in errors[:1]],
        *[goodput] * has_wishes,
        f"{'latency (ms)':<18}{'mean':>13}{'p50':>13}{'p90':>13}{'p99':>13}{'max':>13}",
        *[f"{name:<18}{_milliseconds(distribution)}" for name, distribution in rows],
    ]
    return "\n".join(lines)


def _milliseconds(distribution: Distribution | None) -> str:
    if distribution is None:
        return f"{'-':>13}" * 5
    return "".join(f" {1000.0 * value:>12.3f}" for value in dataclasses.astuple(distribution))


def _items(config: Any) -> list[tuple[str, Any]]:
    return [(field.name, getattr(config, field.name)) for field in dataclasses.fields(config)]


def _source(config: SimulateConfig, system: SimulatedSystem) -> dict[str, Any]:
    """Where the times come from; the flags that name a roofline's device and model mean nothing to fitted ones."""
    model = system.cost_model
    if not isinstance(model, FittedModel):
        device, name = roofline_of(config)
        return {"cost_model_source": model.source, "device": device, "model": name}
    provenance = dataclasses.asdict(model.provenance)
    return {"cost_model_source": model.source, "cost_model_provenance": provenance, "device": None, "model": None}
