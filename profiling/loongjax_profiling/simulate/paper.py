"""`loongjax simulate paper-zipf` and `paper-datasets`: the policies in the setting of the paper's evaluation.

Eight A800 GPUs with Llama-2-7B, by the coefficients of `a800`. What the paper measured on machines is compared in
shape: how far elastic sequence parallelism is ahead, and in which order the others follow.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

from loongjax.config import SchedulingConfig
from loongjax.core.request import NO_SLO, ServiceLevel
from loongjax.costmodel.work import PrefillTotals, Strategy
from loongjax.errors import ConfigError
from loongjax_profiling.metrics import Distribution, ServingMetrics
from loongjax_profiling.output import prepare_file
from loongjax_profiling.provenance import checked_out_commit
from loongjax_profiling.records import RequestRecord
from loongjax_profiling.simulate.a800 import a800_model
from loongjax_profiling.simulate.cluster import PRESETS
from loongjax_profiling.simulate.goodput import highest_rate, keeps_up, least_attainment
from loongjax_profiling.simulate.simulation import SimulatedSystem, simulate
from loongjax_profiling.simulate.workload.lengths import LengthDistribution
from loongjax_profiling.simulate.workload.leval import LEvalLengths
from loongjax_profiling.simulate.workload.lveval import LvEvalLengths
from loongjax_profiling.simulate.workload.mixed import MixedLengths
from loongjax_profiling.simulate.workload.request import WorkloadRequest
from loongjax_profiling.simulate.workload.sharegpt import ShareGptLengths
from loongjax_profiling.simulate.workload.synthetic import synthesize
from loongjax_profiling.simulate.workload.zipf import ZipfLengths

SystemName = Literal[
    "esp",
    "esp-no-scale-up",
    "simple",
    "static-sp4tp2",
    "static-tp8",
    "replicated-tp2x4",
    "prefill-first-tp8",
    "chunked-tp8",
    "disaggregated",
]
TARGET_ATTAINMENT = 0.9
_TPOT_SLO_S = 0.05
_LEAST_TTFT_SLO_S = 15.0
_TTFT_FACTOR = 25.0

ZIPF_CHUNK_TOKENS = 512
"""Of one iteration of chunked-tp8: the paper's block for LightLLM with SplitFuse, as those of the datasets."""
ZIPF_GOODPUT = {
    1.0: {"esp": 1.122, "static-tp8": 0.405, "static-sp4tp2": 0.481, "replicated-tp2x4": 0.360},
    1.2: {"esp": 2.925, "static-tp8": 1.355, "static-sp4tp2": 1.478, "replicated-tp2x4": 1.289},
    1.4: {"esp": 8.757, "static-tp8": 5.723, "static-sp4tp2": 5.447, "replicated-tp2x4": 5.000},
}
"""What the paper's machines did: requests a second of which 90 % met their wishes, by Zipf's exponent."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """One row of the paper's figure 10."""

    lengths: LengthDistribution
    per_token_s: float
    """Mean latency over all tokens that a sustained rate may have."""
    input_s: float
    """Mean time to first token over prompt tokens."""
    output_s: float
    """Mean time per output token."""
    capacity: dict[str, float]
    """What the paper's machines did: requests a second."""
    chunk_tokens: int
    """Tokens of one iteration of chunked-tp8, tuned by the authors to the ratio of prompts to outputs."""


DATASETS = {
    "sharegpt": Dataset(
        lengths=ShareGptLengths(),
        per_token_s=0.092,
        input_s=0.020,
        output_s=0.320,
        capacity={"esp": 24.866, "prefill-first-tp8": 6.224, "chunked-tp8": 22.073, "disaggregated": 10.060},
        chunk_tokens=256,
    ),
    "leval": Dataset(
        lengths=LEvalLengths(),
        per_token_s=0.0035,
        input_s=0.0018,
        output_s=0.320,
        capacity={"esp": 2.249, "prefill-first-tp8": 1.144, "chunked-tp8": 1.226, "disaggregated": 0.415},
        chunk_tokens=2048,
    ),
    "lv-eval": Dataset(
        lengths=LvEvalLengths(),
        per_token_s=0.0025,
        input_s=0.0025,
        output_s=0.365,
        capacity={"esp": 0.201, "prefill-first-tp8": 0.090, "chunked-tp8": 0.082},
        chunk_tokens=16_384,
    ),
    "mixed": Dataset(
        lengths=MixedLengths(),
        per_token_s=0.070,
        input_s=0.090,
        output_s=0.360,
        capacity={"esp": 0.516, "prefill-first-tp8": 0.208, "chunked-tp8": 0.144},
        chunk_tokens=2048,
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PaperConfig:
    """Finds the highest rate that each system sustains.

    Raises:
        ConfigError: a value that cannot work.
    """

    systems: tuple[SystemName, ...] = ("esp", "static-sp4tp2", "static-tp8", "replicated-tp2x4")
    """Who is compared."""
    alphas: tuple[float, ...] = (1.0, 1.2, 1.4)
    """Zipf's exponents (paper-zipf)."""
    datasets: tuple[Literal["sharegpt", "leval", "lv-eval", "mixed"], ...] = ("sharegpt", "leval", "lv-eval", "mixed")
    """Datasets (paper-datasets)."""
    duration_s: float = 300.0
    """How long requests come, in seconds, at every rate."""
    precision: float = 0.03
    """Rates are at most this much too low, relatively."""
    seeds: tuple[int, ...] = (0,)
    """Of lengths and arrivals, at least one: the rate is the median over them, which may differ by tenths where a few
    long prompts decide."""
    tail: float = 0.1
    """A rate is sustained only if all requests have ended this part of the duration after the last one came. Else a
    system would seem to sustain what it puts off until nothing comes any more. The paper looks at latencies alone,
    which is `inf`."""
    num_length_classes: int = 1
    """Classes of prompt lengths, of equally many requests, each of which has to meet the target (paper-zipf); 1: all
    requests together, as in the paper."""
    out: pathlib.Path | None = None
    """JSON file for the results; None: they are only printed."""

    def __post_init__(self) -> None:
        if not self.seeds:
            raise ConfigError("--seeds needs at least one, as in --seeds 0 1 2")
        if not 0.0 < self.duration_s < math.inf or not 0.0 < self.precision < math.inf:
            raise ConfigError(
                f"--duration-s and --precision must be finite and above 0, got {self.duration_s} and {self.precision}"
            )
        if not self.tail >= 0.0:
            raise ConfigError(f"--tail must be at least 0, got {self.tail}")
        if self.num_length_classes < 1:
            raise ConfigError(f"--num-length-classes must be at least 1, got {self.num_length_classes}")


def paper_system(name: SystemName, chunk_tokens: int = ZIPF_CHUNK_TOKENS) -> SimulatedSystem:
    """A system of eight A800 GPUs, with iterations of so many tokens if it cuts prompts into chunks."""
    cluster_name, policy = {
        "esp": ("a800-4xtp2", "esp"),
        "esp-no-scale-up": ("a800-4xtp2", "esp"),
        "simple": ("a800-4xtp2", "simple"),
        "static-sp4tp2": ("a800-4xtp2", "static"),
        "static-tp8": ("a800-1xtp8", "static"),
        "replicated-tp2x4": ("a800-4xtp2", "replicated"),
        "prefill-first-tp8": ("a800-1xtp8", "prefill-first"),
        "chunked-tp8": ("a800-1xtp8", "chunked"),
        "disaggregated": ("a800-4xtp2", "disaggregated"),
    }[name]
    scheduling = SchedulingConfig(
        policy=policy,  # pyright: ignore[reportArgumentType]
        chunk_tokens=chunk_tokens,
        scale_up=name != "esp-no-scale-up",
    )
    return SimulatedSystem(cluster=PRESETS[cluster_name].spec, scheduling=scheduling, cost_model=a800_model())


def zipf_wish(request: WorkloadRequest) -> ServiceLevel:
    """The paper's: the first token within 25 times what the prompt takes on all GPUs, at least 15 s; 50 ms a token."""
    totals = PrefillTotals.of_sums(request.prompt_len, request.prompt_len**2)
    alone_s = a800_model().prefill_s(Strategy(4, 2), totals).item()
    return ServiceLevel(ttft_s=max(_TTFT_FACTOR * alone_s, _LEAST_TTFT_SLO_S), tpot_s=_TPOT_SLO_S)


def sustained_rates(
    system: SimulatedSystem,
    lengths: LengthDistribution,
    is_good: Callable[[Sequence[RequestRecord]], bool],
    config: PaperConfig,
    *,
    slo: Callable[[WorkloadRequest], ServiceLevel] = lambda request: NO_SLO,
    start: float,
) -> list[float]:
    """By seed, the highest rate with which a system keeps up, and at which what it does is good enough.

    Args:
        system: what serves.
        lengths: of requests.
        is_good: whether records are good enough; shorter latencies never make them worse.
        config: how long requests come, by which seeds, and how precise the answer is to be.
        slo: what each request wishes for.
        start: the rate to begin with, requests a second.
    """

    def is_served(records: Sequence[RequestRecord]) -> bool:
        return keeps_up(records, config.tail) and is_good(records)

    def is_sustained(rate: float, seed: int) -> bool:
        num_requests = max(20, round(rate * config.duration_s))
        workload = synthesize(lengths, rate=rate, num_requests=num_requests, seed=seed)
        # Later tokens only make latencies longer: what is not good if all that is missing came at once will not be.
        return is_served(simulate(system, workload, slo=slo, is_hopeless=lambda records: not is_served(records)))

    return [
        highest_rate(functools.partial(is_sustained, seed=seed), start=start, precision=config.precision)
        for seed in config.seeds
    ]


def compare_zipf(config: PaperConfig) -> Iterator[dict[str, Any]]:
    """P90 goodput by exponent and system (the paper's ablation of elastic sequence parallelism), as they are found."""
    for alpha in config.alphas:
        published = ZIPF_GOODPUT.get(alpha, {})
        for name in esp_first(config.systems):
            rates = sustained_rates(
                paper_system(name),
                ZipfLengths(alpha),
                lambda records: least_attainment(records, config.num_length_classes) >= TARGET_ATTAINMENT,
                config,
                slo=zipf_wish,
                start=published.get(name, 1.0),
            )
            yield _row(f"zipf {alpha}", name, rates, published.get(name))


def compare_datasets(config: PaperConfig) -> Iterator[dict[str, Any]]:
    """The rate at which mean latencies cross the paper's limits, by dataset and system (figure 10), likewise."""
    for dataset_name in config.datasets:
        dataset = DATASETS[dataset_name]
        limits = (dataset.per_token_s, dataset.input_s, dataset.output_s)

        def is_good(records: Sequence[RequestRecord], limits: tuple[float, float, float] = limits) -> bool:
            metrics = ServingMetrics.of(records)
            latencies = (metrics.per_token_latency_s, metrics.input_token_latency_s, metrics.output_token_latency_s)
            return not metrics.num_failed and all(map(_is_within, latencies, limits))

        for name in esp_first(config.systems):
            published = dataset.capacity.get(name)
            system = paper_system(name, dataset.chunk_tokens)
            rates = sustained_rates(
                system, dataset.lengths, is_good, config, start=published or dataset.capacity["esp"]
            )
            yield _row(dataset_name, name, rates, published)


def esp_first[Name: str](systems: Iterable[Name]) -> list[Name]:
    """In their order, but for the one that the others are compared with."""
    return sorted(systems, key=lambda name: name != "esp")


def run_paper(figure: Literal["paper-zipf", "paper-datasets"], config: PaperConfig) -> int:
    """Prints what each system sustains as soon as it is found, and writes it if told to.

    Raises:
        KeyboardInterrupt: Ctrl-C ended it; what had been found by then is written.
    """
    if config.out is not None:
        prepare_file(config.out)
    about = {"figure": figure, "duration_s": config.duration_s, "precision": config.precision, "seeds": config.seeds}
    about |= {
        "tail": config.tail if math.isfinite(config.tail) else None,
        "num_length_classes": config.num_length_classes,
        "commit": checked_out_commit(),
    }
    rows: list[dict[str, Any]] = []
    esp: dict[str, Any] | None = None
    print(f"{'workload':<12}{'system':<20}{'requests/s':>12}{'paper':>10}{'esp ahead':>12}{'paper':>10}")
    for row in compare_zipf(config) if figure == "paper-zipf" else compare_datasets(config):
        rows.append(row)
        if row["system"] == "esp":
            esp = row
        published = f"{row['paper_rate']:.3f}" if row["paper_rate"] else "-"
        rates = f"{row['rate']:>12.3f}{published:>10}{_ahead(esp, row, 'rate'):>12}{_ahead(esp, row, 'paper_rate'):>10}"
        print(f"{row['workload']:<12}{row['system']:<20}{rates}", flush=True)
        if config.out is not None:
            config.out.write_text(json.dumps({"about": about, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    return 0


def _is_within(latency: Distribution | None, limit_s: float) -> bool:
    return latency is not None and latency.mean <= limit_s


def _ahead(esp: dict[str, Any] | None, row: dict[str, Any], name: str) -> str:
    """How many times a system's rate elastic sequence parallelism reaches, where both are known and above 0."""
    return f"{esp[name] / row[name]:.2f}x" if esp is not None and esp[name] and row[name] else "-"


def _row(workload: str, system: str, rates: list[float], paper_rate: float | None) -> dict[str, Any]:
    rate = statistics.median(rates)
    return {"workload": workload, "system": system, "rate": rate, "rates": rates, "paper_rate": paper_rate}
