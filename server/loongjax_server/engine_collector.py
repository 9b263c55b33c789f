"""The engine's own numbers, as Prometheus families."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from loongjax.engine.client import EngineStats


class EngineCollector(Collector):
    """Turns the latest snapshot of the engine into metrics; a value that the engine did not tell is left out."""

    def __init__(self, model_name: str) -> None:
        self._labels = {"model_name": model_name, "engine": "0"}
        self._stats: EngineStats | None = None
        self._is_healthy: bool | None = None

    def update(self, stats: EngineStats | None, *, is_healthy: bool) -> None:
        """Takes a snapshot; None if the engine gave none."""
        self._stats = stats
        self._is_healthy = is_healthy

    def collect(self) -> Iterator[Metric]:
        if self._is_healthy is not None:
            yield self._gauge("vllm:engine_healthy", "1 if the engine's step loop answers.", self._is_healthy)
        if self._stats is not None:
            yield from self._engine_metrics(self._stats)
            yield from self._pool_metrics(self._stats)
            yield from self._elastic_metrics(self._stats)

    def _engine_metrics(self, stats: EngineStats) -> Iterator[Metric]:
        yield self._gauge("vllm:num_requests_running", "Requests in execution.", stats.num_requests_running)
        yield self._gauge("vllm:num_requests_waiting", "Requests that wait.", stats.num_requests_waiting)
        yield self._counter("vllm:num_preemptions", "Preempted requests.", stats.num_preemptions)
        yield self._counter("vllm:prompt_tokens", "Prompt tokens computed.", stats.num_prompt_tokens)
        yield self._counter("vllm:generation_tokens", "Tokens generated.", stats.num_generation_tokens)
        for name in ("prefix_cache", "external_prefix_cache"):
            yield self._counter(f"vllm:{name}_queries", "Prompt tokens looked up: there is no such cache.", 0)
            yield self._counter(f"vllm:{name}_hits", "Prompt tokens found: there is no such cache.", 0)
        yield self._counter("loongjax_iterations", "Iterations of all groups.", stats.num_iterations)

    def _pool_metrics(self, stats: EngineStats) -> Iterator[Metric]:
        num_slots = sum(stats.kv_slots)
        if num_slots:
            usage = sum(stats.kv_slots_used) / num_slots
            yield self._gauge("vllm:kv_cache_usage_perc", "Used part of the KV pool, from 0 to 1.", usage)
        info = GaugeMetricFamily(
            "vllm:cache_config_info",
            "Shape of the KV pool, over all instances.",
            labels=[*self._labels, "block_size", "num_gpu_blocks"],
        )
        num_pages = stats.num_pages * len(stats.kv_slots)
        info.add_metric([*self._labels.values(), str(stats.page_size), str(num_pages)], 1.0)
        yield info
        yield self._by_instance("loongjax_kv_slots_used", "Tokens of capacity in use.", stats.kv_slots_used)
        yield self._by_instance("loongjax_kv_slots", "Tokens of capacity.", stats.kv_slots)

    def _elastic_metrics(self, stats: EngineStats) -> Iterator[Metric]:
        yield self._dop_histogram("loongjax_prefill_dop", "prefill", stats.prefill_dop, len(stats.kv_slots))
        yield self._dop_histogram("loongjax_decode_dop", "decode", stats.decode_dop, len(stats.kv_slots))
        yield self._counter(
            "loongjax_scale_up", "Times a request's decode group gained an instance.", stats.num_scale_ups
        )
        yield self._counter("loongjax_scale_down", "Times a request's group lost an instance.", stats.num_scale_downs)
        yield self._counter(
            "loongjax_kv_migrated_bytes", "Bytes of keys and values moved between instances.", stats.kv_migrated_bytes
        )
        yield self._counter("loongjax_recompile", "Executables built or loaded after ready.", stats.num_recompiles)

    def _gauge(self, name: str, documentation: str, value: float | int) -> Metric:
        family = GaugeMetricFamily(name, documentation, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), float(value))
        return family

    def _counter(self, name: str, documentation: str, value: float | int) -> Metric:
        family = CounterMetricFamily(name, documentation, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), float(value))
        return family

    def _by_instance(self, name: str, documentation: str, values: tuple[int, ...]) -> Metric:
        family = GaugeMetricFamily(name, documentation, labels=[*self._labels, "instance"])
        for instance, value in enumerate(values):
            family.add_metric([*self._labels.values(), str(instance)], float(value))
        return family

    def _dop_histogram(self, name: str, phase: str, counts: Mapping[int, int], num_instances: int) -> Metric:
        """One bucket for every degree of parallelism that the instances allow."""
        family = HistogramMetricFamily(name, f"Degree of parallelism of {phase} iterations.", labels=list(self._labels))
        bounds = range(1, max(num_instances, *counts.keys(), 1) + 1)
        buckets = [
            (f"{bound:.1f}", float(sum(count for dop, count in counts.items() if dop <= bound))) for bound in bounds
        ]
        buckets.append(("+Inf", float(sum(counts.values()))))
        total = float(sum(dop * count for dop, count in counts.items()))
        family.add_metric(list(self._labels.values()), buckets, total)
        return family
