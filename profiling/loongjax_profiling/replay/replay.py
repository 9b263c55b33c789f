"""A replay from its configuration to its files."""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import tqdm

from loongjax.core.request import Request
from loongjax.costmodel.model import CostModel, FittedModel
from loongjax.engine.client import EngineStats
from loongjax.runtime.simulated import NO_HOST, HostTimes, Span
from loongjax_profiling.elasticity import Elasticity
from loongjax_profiling.output import prepare_file, prepare_folder
from loongjax_profiling.provenance import checked_out_commit
from loongjax_profiling.records import RequestRecord, write_records
from loongjax_profiling.replay.comparison import (
    ReplayComparison,
    compare_iterations,
    compare_latencies,
    summarize_spans,
)
from loongjax_profiling.replay.config import ReplayConfig
from loongjax_profiling.replay.engine import ReplayEngine
from loongjax_profiling.replay.host_times import measure_host_times
from loongjax_profiling.replay.player import Playback, Player, make_requests
from loongjax_profiling.replay.report import format_comparison, write_comparison, write_iterations
from loongjax_profiling.replay.scaled_model import ScaledModel
from loongjax_profiling.replay.traced_runtime import TracedIteration
from loongjax_profiling.simulate.assembly import make_workload, service_level
from loongjax_profiling.simulate.report import describe
from loongjax_profiling.simulate.simulation import SimulatedSystem, simulate
from loongjax_profiling.simulate.workload.request import WorkloadRequest

FILES = ("measured.jsonl", "iterations.jsonl", "simulated.jsonl", "comparison.json")


def replay(config: ReplayConfig, command_line: str) -> int:
    """Plays, simulates, compares, and writes it all down.

    Args:
        config: what to play on what.
        command_line: is stored too.

    Returns:
        1 if a request failed, else 0.

    Raises:
        ConfigError: what cannot be replayed.
        EngineError: the engine failed; the records of requests that had ended are written.
        KeyboardInterrupt: Ctrl-C ended it; what had ended by then was compared and written down.
    """
    workload = make_workload(config, tell=print)
    inputs = {"--trace": config.trace, "--cost-model": config.cost_model}
    prepare_folder(config.out, FILES, inputs=inputs)
    if config.explain is not None:
        prepare_file(pathlib.Path(config.explain), "--explain", inputs=inputs)
    engine = ReplayEngine(config)
    print(f"{engine.hardware}: ready after {engine.ready_s:.1f} s, {engine.cluster}", flush=True)
    try:
        calibrated, host = _calibrate(engine, config)
        num_before = engine.runtime.num_recompiles
        playback = _play(engine, config, _requests(engine, config, workload))
        num_recompiles = engine.runtime.num_recompiles - num_before
    finally:
        engine.close()
    iterations = engine.runtime.take_iterations()
    write_iterations(
        iterations, engine.cost_model, engine.cluster.tp, playback.begin_s, config.out / "iterations.jsonl"
    )
    errors = [record.error for record in playback.records if record.error is not None]
    print(
        f"played {len(playback.records)} of {len(workload)} requests, {len(errors)} failed; "
        f"{num_recompiles} compilations",
        *[f"the first that failed: {error}" for error in errors[:1]],
        sep="\n",
        flush=True,
    )

    comparison = _compare(engine, config, playback, iterations, workload[: playback.num_sent], calibrated, host)
    about = _about(config, engine, playback) | {"command": command_line, "num_recompiles": num_recompiles}
    write_comparison(comparison, about, config.out / "comparison.json")
    print(f"{format_comparison(comparison)}\n{config.out}/")
    if playback.is_interrupted:
        raise KeyboardInterrupt
    return int(bool(errors))


def _calibrate(engine: ReplayEngine, config: ReplayConfig) -> tuple[CostModel, HostTimes]:
    """What iterations take, and what the host adds, measured on other requests."""
    if config.num_calibration_requests == 0:
        return engine.cost_model, NO_HOST
    other = dataclasses.replace(config, seed=config.seed + 1, num_requests=config.num_calibration_requests)
    player = Player(engine.new_core(), engine.runtime)
    playback = player.play(_requests(engine, other, make_workload(other)), limit_s=config.limit_s)
    if playback.is_interrupted:
        raise KeyboardInterrupt
    iterations = [each for each in engine.runtime.take_iterations() if each.error is None]
    model = ScaledModel.of(iterations, engine.cost_model, engine.cluster.tp)
    host = measure_host_times(playback, iterations, model, engine.cluster.tp)
    factors = f"prefills take {model.prefill_factor:.3f} and decodes {model.decode_factor:.3f} times the prediction"
    print(
        f"calibrated on {len(playback.records)} requests: {factors}; the host adds, in ms: {_in_ms(host)}", flush=True
    )
    return model, host


def _in_ms(host: HostTimes) -> str:
    times_s = dataclasses.asdict(host).items()
    return ", ".join(f"{name.removesuffix('_s').replace('_', ' ')} {1000.0 * each_s:.3f}" for name, each_s in times_s)


def _requests(engine: ReplayEngine, config: ReplayConfig, workload: Sequence[WorkloadRequest]) -> list[Request]:
    return make_requests(workload, vocab_size=engine.info.vocab_size, slo=service_level(config), seed=config.seed)


def _play(engine: ReplayEngine, config: ReplayConfig, requests: Sequence[Request]) -> Playback:
    """Writes the records, however it ends."""
    with tqdm.tqdm(total=len(requests), desc="Replaying", unit="request", disable=not sys.stderr.isatty()) as bar:
        player = Player(engine.new_core(), engine.runtime, on_end=bar.update)
        try:
            return player.play(requests, limit_s=config.limit_s)
        finally:
            write_records(player.records, config.out / "measured.jsonl")


def _compare(
    engine: ReplayEngine,
    config: ReplayConfig,
    playback: Playback,
    iterations: Sequence[TracedIteration],
    workload: Sequence[WorkloadRequest],
    calibrated: CostModel,
    host: HostTimes,
) -> ReplayComparison:
    begin_s = time.perf_counter()
    spans: list[Span] = []
    stats: list[EngineStats] = []
    model, tp = engine.cost_model, engine.cluster.tp
    succeeded = [each for each in iterations if each.error is None]
    simulated = _simulate(engine, config, workload, calibrated, host, spans, stats)
    print(f"simulated in {time.perf_counter() - begin_s:.1f} s", flush=True)
    write_records(simulated, config.out / "simulated.jsonl")
    as_fitted = _simulate(engine, config, workload, model, host)
    true_model = ScaledModel.of(succeeded, model, tp)
    true_host = measure_host_times(playback, succeeded, true_model, tp)
    in_hindsight = _simulate(engine, config, workload, true_model, true_host)
    return ReplayComparison(
        host=host,
        latencies=compare_latencies(playback.records, simulated),
        latencies_as_fitted=compare_latencies(playback.records, as_fitted),
        latencies_in_hindsight=compare_latencies(playback.records, in_hindsight),
        iterations=compare_iterations(succeeded, model, tp),
        simulated_iterations=summarize_spans(spans),
        elasticity=Elasticity.of([playback.stats]),
        simulated_elasticity=Elasticity.of(stats),
    )


def _simulate(
    engine: ReplayEngine,
    config: ReplayConfig,
    workload: Sequence[WorkloadRequest],
    cost_model: CostModel,
    host: HostTimes,
    spans: list[Span] | None = None,
    stats: list[EngineStats] | None = None,
) -> list[RequestRecord]:
    """Appends what happened to the lists."""
    wish = service_level(config)
    return simulate(
        SimulatedSystem(
            cluster=engine.cluster,
            scheduling=dataclasses.replace(config, explain=None),  # the file tells what the engine decided
            cost_model=cost_model,
            pod_size=engine.cluster.num_instances,
            step_by_step=True,
            run_ahead=config.run_ahead,
            host=host,
        ),
        workload,
        slo=lambda request: wish,
        on_span=spans.append if spans is not None else lambda span: None,
        on_end=stats.extend if stats is not None else lambda stats: None,
        progress=sys.stderr.isatty(),
    )


def _about(config: ReplayConfig, engine: ReplayEngine, playback: Playback) -> dict[str, Any]:
    model = engine.cost_model
    return describe(config) | {
        "hardware": engine.hardware,
        "cluster": describe(engine.cluster),
        "cost_model_source": model.source,
        "cost_model_provenance": dataclasses.asdict(model.provenance) if isinstance(model, FittedModel) else None,
        "commit": config.commit or checked_out_commit(),
        "jax": jax.__version__,
        "ready_s": engine.ready_s,
        "num_sent": playback.num_sent,
        "num_ended": len(playback.records),
        "num_failed": sum(record.error is not None for record in playback.records),
        "is_interrupted": playback.is_interrupted,
        "mean_intake_s": playback.mean_intake_s,
        "mean_telling_s": playback.mean_telling_s,
        "predicted_over_actual": {
            f"{kind}, {strategy}": ratio for (kind, strategy), ratio in playback.stats.predicted_over_actual.items()
        },
    }
