"""/metrics, read by Prometheus's own parser; /health and its kin."""

from __future__ import annotations

import time

import pytest
from prometheus_client.parser import text_string_to_metric_families
from server_client import RunningServer
from server_fakes import FakeEngine

from loongjax.core.request import FinishReason
from loongjax.costmodel.work import Strategy
from loongjax.engine.client import EngineStats

STATS = EngineStats(
    num_requests_running=3,
    num_requests_waiting=2,
    kv_slots_used=(64, 0, 16),
    kv_slots=(160, 160, 160),
    page_size=16,
    num_pages=10,
    prefill_dop={1: 5, 3: 2},
    decode_dop={2: 7},
    num_scale_ups=4,
    num_scale_downs=5,
    kv_migrated_bytes=2**40,
    num_recompiles=1,
    num_preemptions=6,
    num_prompt_tokens=100,
    num_generation_tokens=50,
    num_iterations=14,
    iteration_tokens={1: 4, 4: 3, 128: 2, 2**21: 1},
    num_iteration_tokens=1_200_000,
    predicted_over_actual={("prefill", Strategy(2)): 1.25, ("decode", Strategy(1, 4)): 0.5},
)
KNOWN_NAMES = [
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "cache_config_info",
    "engine_healthy",
    "prompt_tokens_total",
    "generation_tokens_total",
    "request_success_total",
    "num_preemptions_total",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "prompt_tokens_cached_total",
    "external_prefix_cache_queries_total",
    "external_prefix_cache_hits_total",
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_inference_time_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "request_max_num_generation_tokens",
    "request_params_n",
    "request_params_max_tokens",
    "iteration_tokens_total",
    "request_prefill_kv_computed_tokens",
]
"""What dashboards and benchmark tools ask for, each with `vllm:` before it."""
LABELS = {"model_name": "tiny-llama", "engine": "0"}


def samples(server: RunningServer) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample by its name and its labels beyond the common ones."""
    answer = server.get("/metrics")
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    found: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    for family in text_string_to_metric_families(answer.body.decode()):
        for sample in family.samples:
            assert sample.labels.items() >= LABELS.items()
            rest = tuple(sorted(sample.labels.items() - LABELS.items()))
            assert (sample.name, rest) not in found
            found[sample.name, rest] = sample.value
    return found


def value(server: RunningServer, name: str, **labels: str) -> float:
    return samples(server)[name, tuple(sorted(labels.items()))]


@pytest.fixture
def measured(serve) -> RunningServer:
    engine = FakeEngine()
    engine.engine_stats = STATS
    return serve(engine)


def test_the_engines_numbers_are_told_under_known_names(measured: RunningServer):
    found = samples(measured)
    expected = {
        "vllm:num_requests_running": 3,
        "vllm:num_requests_waiting": 2,
        "vllm:kv_cache_usage_perc": 80 / 480,
        "vllm:num_preemptions_total": 6,
        "vllm:prompt_tokens_total": 100,
        "vllm:generation_tokens_total": 50,
        "vllm:engine_healthy": 1,
        "loongjax_scale_up_total": 4,
        "loongjax_scale_down_total": 5,
        "loongjax_kv_migrated_bytes_total": 2**40,
        "loongjax_recompile_total": 1,
        "loongjax_iterations_total": 14,
    }
    assert {name: found[name, ()] for name in expected} == expected
    assert found["vllm:cache_config_info", (("block_size", "16"), ("num_gpu_blocks", "30"))] == 1


def test_every_known_name_is_there(measured: RunningServer):
    names = {name.removesuffix("_count") for name, _ in samples(measured)}
    assert [name for name in KNOWN_NAMES if f"vllm:{name}" not in names] == []


def test_the_caches_that_do_not_exist_are_asked_and_hit_never(measured: RunningServer):
    measured.post("/v1/completions", {"prompt": "abc"})
    found = samples(measured)
    for cache in ("prefix_cache", "external_prefix_cache"):
        assert found[f"vllm:{cache}_queries_total", ()] == found[f"vllm:{cache}_hits_total", ()] == 0


def test_every_way_to_end_has_a_series_from_the_beginning(measured: RunningServer):
    for reason in FinishReason:
        assert value(measured, "vllm:request_success_total", finished_reason=reason.value) == 0


def test_the_pool_is_told_by_instance(measured: RunningServer):
    assert [value(measured, "loongjax_kv_slots_used", instance=str(i)) for i in range(3)] == [64, 0, 16]
    assert [value(measured, "loongjax_kv_slots", instance=str(i)) for i in range(3)] == [160] * 3


def test_degrees_of_parallelism_are_histograms_with_a_bucket_for_each(measured: RunningServer):
    buckets = [value(measured, "loongjax_prefill_dop_bucket", le=bound) for bound in ("1.0", "2.0", "3.0", "+Inf")]
    assert buckets == [5, 5, 7, 7]
    assert value(measured, "loongjax_prefill_dop_count") == 7
    assert value(measured, "loongjax_prefill_dop_sum") == 5 * 1 + 2 * 3
    assert value(measured, "loongjax_decode_dop_bucket", le="1.0") == 0
    assert value(measured, "loongjax_decode_dop_sum") == 14


def test_how_far_predictions_are_off_is_told_by_kind_and_strategy(measured: RunningServer):
    found = {labels: value for (name, labels), value in samples(measured).items() if "predicted_over_actual" in name}
    assert found == {
        (("kind", "prefill"), ("sp", "2"), ("tp", "1")): 1.25,
        (("kind", "decode"), ("sp", "1"), ("tp", "4")): 0.5,
    }


def test_iterations_are_sorted_by_their_tokens_into_the_buckets_that_dashboards_know(measured: RunningServer):
    found = samples(measured)
    name = "vllm:iteration_tokens_total"
    at_most = {float(labels[0][1]): count for (key, labels), count in found.items() if key == f"{name}_bucket"}
    expected = {1: 4, 8: 7, 16: 7, 32: 7, 64: 7, 128: 9, 256: 9, 512: 9, 1024: 9, 2048: 9, 4096: 9, 8192: 9, 16384: 9}
    assert expected.items() <= at_most.items()
    assert at_most[2.0**20] == 9
    assert at_most[float("inf")] == found[f"{name}_count", ()] == 10
    assert found[f"{name}_sum", ()] == 1_200_000


def test_every_sample_is_measured_once(measured: RunningServer):
    body = {"prompt": ["abc", "de"], "n": 2, "max_tokens": 5}
    measured.post("/v1/completions", body)
    found = samples(measured)
    assert found["vllm:time_to_first_token_seconds_count", ()] == 4
    assert found["vllm:inter_token_latency_seconds_count", ()] == 4 * 4
    assert found["vllm:e2e_request_latency_seconds_count", ()] == 4
    assert found["vllm:request_time_per_output_token_seconds_count", ()] == 4
    assert found["vllm:request_generation_tokens_sum", ()] == 20
    assert found["vllm:request_prompt_tokens_sum", ()] == 4 + 3
    assert found["vllm:request_params_n_sum", ()] == 4
    assert found["vllm:request_params_max_tokens_sum", ()] == 10
    assert found["vllm:request_max_num_generation_tokens_count", ()] == 2
    assert found["vllm:request_max_num_generation_tokens_sum", ()] == 10
    assert found["vllm:request_prefill_kv_computed_tokens_sum", ()] == 4 + 3
    assert found["vllm:request_success_total", (("finished_reason", "length"),)] == 4


def test_latencies_are_no_less_than_the_engines_and_add_up(serve):
    server = serve(FakeEngine(delay_s=0.02))
    server.post("/v1/completions", {"prompt": "a", "max_tokens": 3})
    found = samples(server)
    ttft_s = found["vllm:time_to_first_token_seconds_sum", ()]
    itl_s = found["vllm:inter_token_latency_seconds_sum", ()]
    assert ttft_s >= 0.02
    assert itl_s >= 2 * 0.02
    assert found["vllm:e2e_request_latency_seconds_sum", ()] == pytest.approx(ttft_s + itl_s)
    assert found["vllm:request_time_per_output_token_seconds_sum", ()] == pytest.approx(itl_s / 2)


def test_the_engines_timings_are_observed_once_a_sample(measured: RunningServer):
    measured.post("/v1/completions", {"prompt": "abc", "n": 2, "max_tokens": 3})
    found = samples(measured)
    sums = {"queue": 1.0, "prefill": 2.0, "decode": 4.0, "inference": 6.0}
    for name, seconds in sums.items():
        assert found[f"vllm:request_{name}_time_seconds_count", ()] == 2
        assert found[f"vllm:request_{name}_time_seconds_sum", ()] == 2 * seconds


def test_a_refused_request_is_not_measured(measured: RunningServer):
    measured.post("/v1/completions", {"prompt": "", "add_special_tokens": False})
    found = samples(measured)
    assert found["vllm:request_prompt_tokens_count", ()] == 0
    assert found["vllm:request_success_total", (("finished_reason", "abort"),)] == 0


@pytest.mark.parametrize("fault", ["is_dead", "is_wedged"])
def test_what_a_silent_engine_did_not_tell_is_left_out(serve, fault):
    server = serve(FakeEngine(), metrics_timeout_s=0.1)
    setattr(server.engine, fault, True)
    found = samples(server)
    assert found["vllm:engine_healthy", ()] == 0
    assert not any(name.startswith("loongjax_") for name, _ in found)


def test_a_wedged_engine_does_not_hold_the_page_back_as_long_as_scrapers_wait(serve, caplog):
    server = serve(FakeEngine())
    server.engine.is_wedged = True
    start_s = time.monotonic()
    assert value(server, "vllm:engine_healthy") == 0
    assert time.monotonic() - start_s < 5
    assert "no answer within 2 s" in caplog.text


def test_two_applications_measure_apart(serve):
    one, other = serve(FakeEngine()), serve(FakeEngine())
    one.post("/v1/completions", {"prompt": "a"})
    assert value(one, "vllm:request_params_n_count") == 1
    assert value(other, "vllm:request_params_n_count") == 0


@pytest.mark.parametrize("path", ["/health", "/ping"])
def test_health_is_what_the_engine_says(serve, path):
    server = serve(FakeEngine(), health_timeout_s=0.05)
    answer = server.get(path)
    assert (answer.status, answer.body) == (200, b"")
    server.engine.is_dead = True
    assert server.get(path).status == 503


def test_a_wedged_engine_is_not_healthy(serve):
    server = serve(FakeEngine(), health_timeout_s=0.05)
    server.engine.is_wedged = True
    answer = server.get("/health")
    assert answer.status == 503
    assert "did not answer" in answer.error["message"]


def test_the_version_is_told(server: RunningServer):
    assert server.get("/version").json["version"]
