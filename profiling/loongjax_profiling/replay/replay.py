"""A replay from its configuration to its files."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import tqdm

from loongjax.core.request import Request
from loongjax.errors import ConfigError
from loongjax.runtime.simulated import Span
from loongjax_profiling.provenance import checked_out_commit
from loongjax_profiling.records import write_records
from loongjax_profiling.replay.comparison import compare_iterations, compare_latencies, summarize_spans
from loongjax_profiling.replay.config import ReplayConfig
from loongjax_profiling.replay.engine import ReplayEngine, build_replay_engine
from loongjax_profiling.replay.player import Playback, Player, make_requests
from loongjax_profiling.replay.report import ReplayComparison, write_comparison, write_iterations
from loongjax_profiling.simulate.assembly import make_workload, service_level
from loongjax_profiling.simulate.report import describe
from loongjax_profiling.simulate.simulation import SimulatedSystem, simulate


def replay(config: ReplayConfig, command_line: str) -> int:
    """Plays, simulates, compares, and writes it all down.

    Args:
        config: what to play on what.
        command_line: is stored too.

    Returns:
        1 if a request failed, else 0.

    Raises:
        ConfigError: what cannot be replayed.
        EngineError: the engine failed.
        KeyboardInterrupt: Ctrl-C ended it; what had ended by then was compared and written down.
    """
    workload, wish = make_workload(config), service_level(config)
    try:
        config.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {config.out} cannot be made: {error}") from None
    engine = build_replay_engine(config)
    print(f"{engine.hardware}: ready after {engine.ready_s:.1f} s, {engine.cluster}", flush=True)
    requests = make_requests(workload, vocab_size=engine.core.info.vocab_size, slo=wish, seed=config.seed)
    playback, num_recompiles = _play(engine, config, requests)
    iterations = [each for each in engine.runtime.iterations if each.error is None]
    tp = engine.cluster.tp
    write_iterations(
        engine.runtime.iterations, engine.cost_model, tp, playback.begin_s, config.out / "iterations.jsonl"
    )
    print(f"played {len(playback.records)} of {len(workload)} requests, and {num_recompiles} compilations", flush=True)

    spans: list[Span] = []
    begin_s = time.perf_counter()
    simulated = simulate(
        SimulatedSystem(cluster=engine.cluster, scheduling=config, cost_model=engine.cost_model),
        workload[: playback.num_sent],
        slo=lambda request: wish,
        on_span=spans.append,
        progress=sys.stderr.isatty(),
    )
    print(f"simulated in {time.perf_counter() - begin_s:.1f} s", flush=True)
    write_records(simulated, config.out / "simulated.jsonl")
    comparison = ReplayComparison(
        latencies=compare_latencies(playback.records, simulated),
        iterations=compare_iterations(iterations, engine.cost_model, tp),
        simulated_iterations=summarize_spans(spans),
    )
    about = _about(config, engine, playback) | {"command": command_line, "num_recompiles": num_recompiles}
    write_comparison(comparison, about, config.out / "comparison.json")
    print(f"{comparison}\n{config.out}/")
    if playback.is_interrupted:
        raise KeyboardInterrupt
    return int(any(record.error is not None for record in playback.records))


def _play(engine: ReplayEngine, config: ReplayConfig, requests: Sequence[Request]) -> tuple[Playback, int]:
    """What came of it, and how many programs were built meanwhile. Writes the records, however it ends."""
    num_before = engine.runtime.num_recompiles
    with tqdm.tqdm(total=len(requests), desc="Replaying", unit="request", disable=not sys.stderr.isatty()) as bar:
        player = Player(engine.core, engine.runtime.now_s, on_end=bar.update)
        try:
            playback = player.play(requests, limit_s=config.limit_s)
            return playback, engine.runtime.num_recompiles - num_before
        finally:
            write_records(player.records, config.out / "measured.jsonl")
            engine.core.close()


def _about(config: ReplayConfig, engine: ReplayEngine, playback: Playback) -> dict[str, Any]:
    return describe(config) | {
        "hardware": engine.hardware,
        "cluster": describe(engine.cluster),
        "cost_model_source": engine.cost_model.source,
        "commit": config.commit or checked_out_commit(),
        "jax": jax.__version__,
        "ready_s": engine.ready_s,
        "num_sent": playback.num_sent,
        "num_ended": len(playback.records),
        "num_failed": sum(record.error is not None for record in playback.records),
        "is_interrupted": playback.is_interrupted,
        "largest_delay_s": playback.largest_delay_s,
    }
