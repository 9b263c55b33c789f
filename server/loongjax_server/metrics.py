"""What the server measures of requests, and the page that Prometheus reads.

Names beginning with `vllm:` are those that existing dashboards and benchmark tools ask for.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from loongjax.core.request import FinishReason, Timings
from loongjax.core.sampling import SamplingParams
from loongjax.engine.client import EngineStats, OutputDelta
from loongjax_server.engine_collector import EngineCollector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_TTFT_BUCKETS_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.25, 2.5, 5, 10, 20, 40, 80, 160, 640, 2560)
_ITL_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.4, 0.8, 1.6, 5, 20, 80)
_E2E_BUCKETS_S = (0.1, 0.3, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 240, 480, 960, 1920, 7680)
_TOKEN_BUCKETS = tuple(float(4**power) for power in range(11))
_N_BUCKETS = (1, 2, 5, 10, 20, 50, 100)


class Metrics:
    """The metrics of one application, in a registry of its own."""

    def __init__(self, model_name: str) -> None:
        self._registry = CollectorRegistry()
        self._labels = {"model_name": model_name, "engine": "0"}
        self._engine = EngineCollector(model_name)
        self._registry.register(self._engine)
        self.ttft_s = self._histogram("time_to_first_token_seconds", "Arrival to first token.", _TTFT_BUCKETS_S)
        self.itl_s = self._histogram("inter_token_latency_seconds", "Gap between token steps.", _ITL_BUCKETS_S)
        self.tpot_s = self._histogram(
            "request_time_per_output_token_seconds", "Mean gap between the tokens of a request.", _ITL_BUCKETS_S
        )
        self.e2e_s = self._histogram("e2e_request_latency_seconds", "Arrival to last token.", _E2E_BUCKETS_S)
        self.queue_s = self._histogram("request_queue_time_seconds", "Acceptance to prefill.", _E2E_BUCKETS_S)
        self.prefill_s = self._histogram("request_prefill_time_seconds", "Prefill to first token.", _E2E_BUCKETS_S)
        self.decode_s = self._histogram("request_decode_time_seconds", "First to last token.", _E2E_BUCKETS_S)
        self.inference_s = self._histogram("request_inference_time_seconds", "Prefill to last token.", _E2E_BUCKETS_S)
        self.prompt_tokens = self._histogram("request_prompt_tokens", "Prompt tokens of a request.", _TOKEN_BUCKETS)
        self.output_tokens = self._histogram(
            "request_generation_tokens", "Generated tokens of a request.", _TOKEN_BUCKETS
        )
        self.max_output_tokens = self._histogram(
            "request_max_num_generation_tokens", "Generated tokens of a request's longest sample.", _TOKEN_BUCKETS
        )
        self.computed_prompt_tokens = self._histogram(
            "request_prefill_kv_computed_tokens", "Prompt tokens of a request that were computed.", _TOKEN_BUCKETS
        )
        self.params_n = self._histogram("request_params_n", "n of a request.", _N_BUCKETS)
        self.params_max_tokens = self._histogram(
            "request_params_max_tokens", "max_tokens of a request that sets it.", _TOKEN_BUCKETS
        )
        self._success = Counter(
            "vllm:request_success",
            "Samples that ended, by reason.",
            [*self._labels, "finished_reason"],
            registry=self._registry,
        )
        for reason in FinishReason:
            self._success.labels(**self._labels, finished_reason=reason.value)
        self._cached_tokens = Counter(
            "vllm:prompt_tokens_cached",
            "Prompt tokens whose keys were in the pool already.",
            list(self._labels),
            registry=self._registry,
        ).labels(**self._labels)

    def observe_timings(self, timings: Timings) -> None:
        """Takes in where the time of a sample went, as the engine measured it."""
        self.queue_s.observe(timings.queue_s)
        self.prefill_s.observe(timings.prefill_s)
        self.decode_s.observe(timings.decode_s)
        self.inference_s.observe(timings.inference_s)

    def count_finished(self, reason: FinishReason) -> None:
        """One more sample ended."""
        self._success.labels(**self._labels, finished_reason=reason.value).inc()

    def count_cached_tokens(self, num_tokens: int) -> None:
        """That many prompt tokens of a request were not computed."""
        self._cached_tokens.inc(num_tokens)

    def render(self, stats: EngineStats | None, *, is_healthy: bool) -> bytes:
        """The page in Prometheus's text format 0.0.4. Without `stats`, what only the engine knows is left out."""
        self._engine.update(stats, is_healthy=is_healthy)
        return generate_latest(self._registry)

    def _histogram(self, name: str, documentation: str, buckets: Sequence[float | int]) -> Histogram:
        histogram = Histogram(
            f"vllm:{name}", documentation, list(self._labels), buckets=buckets, registry=self._registry
        )
        return histogram.labels(**self._labels)


class RequestRecorder:
    """Measures one engine request as its deltas pass; used as an asynchronous context, which sees how it ends."""

    def __init__(self, metrics: Metrics, num_prompt_tokens: int, sampling: SamplingParams, arrival_s: float) -> None:
        """`arrival_s` is on the clock of `time.perf_counter`."""
        self.num_finished = 0
        self._metrics = metrics
        self._num_prompt_tokens = num_prompt_tokens
        self._sampling = sampling
        self._arrival_s = arrival_s
        self._first_token_s: dict[int, float] = {}
        self._last_token_s: dict[int, float] = {}
        self._num_output_tokens: list[int] = []
        """Of each sample that ended as it should."""
        self._is_accepted = False

    def observe(self, delta: OutputDelta) -> None:
        """Takes in one delta at the time it arrives."""
        now_s = time.perf_counter()
        if not self._is_accepted:
            self._accept(delta)
        if delta.token_ids:
            last_s = self._last_token_s.get(delta.index)
            if last_s is None:
                self._first_token_s[delta.index] = now_s
                self._metrics.ttft_s.observe(now_s - self._arrival_s)
            else:
                self._metrics.itl_s.observe(now_s - last_s)
            self._last_token_s[delta.index] = now_s
        if delta.finish_reason is not None:
            self._finish(delta, delta.finish_reason)

    def _accept(self, delta: OutputDelta) -> None:
        self._is_accepted = True
        self._metrics.prompt_tokens.observe(self._num_prompt_tokens)
        self._metrics.computed_prompt_tokens.observe(self._num_prompt_tokens - delta.num_cached_tokens)
        self._metrics.count_cached_tokens(delta.num_cached_tokens)
        self._metrics.params_n.observe(self._sampling.n)
        if self._sampling.max_tokens is not None:
            self._metrics.params_max_tokens.observe(self._sampling.max_tokens)

    def _finish(self, delta: OutputDelta, reason: FinishReason) -> None:
        self.num_finished += 1
        self._metrics.count_finished(reason)
        if reason not in (FinishReason.STOP, FinishReason.LENGTH):
            return
        self._metrics.output_tokens.observe(delta.num_output_tokens)
        self._num_output_tokens.append(delta.num_output_tokens)
        if len(self._num_output_tokens) == self._sampling.n:
            self._metrics.max_output_tokens.observe(max(self._num_output_tokens))
        if delta.timings is not None:
            self._metrics.observe_timings(delta.timings)
        last_s = self._last_token_s.get(delta.index)
        if last_s is not None:
            self._metrics.e2e_s.observe(last_s - self._arrival_s)
            if delta.num_output_tokens > 1:
                decode_s = last_s - self._first_token_s[delta.index]
                self._metrics.tpot_s.observe(decode_s / (delta.num_output_tokens - 1))

    async def __aenter__(self) -> RequestRecorder:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Samples still running when a request that had begun is left were aborted: its client went away.
        if kind is not None and not issubclass(kind, Exception) and self._is_accepted:
            for _ in range(self._sampling.n - self.num_finished):
                self._metrics.count_finished(FinishReason.ABORT)
