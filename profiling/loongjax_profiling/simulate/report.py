"""What a simulation leaves behind: records, metrics and a picture, and a few lines to read."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

from loongjax_profiling.metrics import Distribution, ServingMetrics


def write_metrics(metrics: ServingMetrics, about: dict[str, Any], path: pathlib.Path) -> None:
    """One JSON object: the metrics, and under "about" where they come from."""
    path.write_text(json.dumps(metrics.as_json() | {"about": about}, indent=2, default=str) + "\n", encoding="utf-8")


def describe(config: Any) -> dict[str, Any]:
    """A configuration as JSON: what was asked for."""
    return {name: value if not isinstance(value, pathlib.Path) else str(value) for name, value in _items(config)}


def summary(metrics: ServingMetrics) -> str:
    """The metrics in lines of text."""
    rows = [
        ("per token", metrics.per_token_latency_s),
        ("per input token", metrics.input_token_latency_s),
        ("per output token", metrics.output_token_latency_s),
        ("to first token", metrics.ttft_s),
        ("whole request", metrics.latency_s),
    ]
    lines = [
        f"{metrics.num_requests} requests in {metrics.duration_s:.1f} s, {metrics.num_failed} failed: "
        f"{metrics.request_throughput:.3f} requests, {metrics.input_throughput:.0f} prompt tokens and "
        f"{metrics.output_throughput:.0f} generated tokens a second",
        f"{100.0 * metrics.slo_attainment:.2f} % met their wishes: goodput {metrics.goodput:.3f} requests a second",
        f"{'latency (ms)':<18}{'mean':>12}{'p50':>12}{'p90':>12}{'p99':>12}{'max':>12}",
        *[f"{name:<18}{_milliseconds(distribution)}" for name, distribution in rows],
    ]
    return "\n".join(lines)


def _milliseconds(distribution: Distribution | None) -> str:
    if distribution is None:
        return f"{'-':>12}" * 5
    return "".join(f"{1000.0 * value:>12.3f}" for value in dataclasses.astuple(distribution))


def _items(config: Any) -> list[tuple[str, Any]]:
    return [(field.name, getattr(config, field.name)) for field in dataclasses.fields(config)]
