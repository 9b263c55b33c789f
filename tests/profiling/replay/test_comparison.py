"""Both sides of a replay, beside numbers worked out by hand."""

import json

import pytest

from loongjax.core.cluster import Group
from loongjax.runtime.simulated import HostTimes, Span
from loongjax_profiling.elasticity import Elasticity
from loongjax_profiling.records import RequestRecord
from loongjax_profiling.replay.comparison import (
    LATENCIES,
    STATISTICS,
    ReplayComparison,
    compare_iterations,
    compare_latencies,
    summarize_spans,
)
from loongjax_profiling.replay.report import format_comparison, write_comparison, write_iterations
from tests.profiling.replay.iterations import traced_decode, traced_prefill, traced_recovery
from tests.profiling.simulate.systems import RoundModel


def record(index: int, *, ttft_s: float, tpot_s: float = 0.01, output_len: int = 11, error: str | None = None):
    """A request of 10 tokens that came at second `index`."""
    return RequestRecord(
        request_id=f"request-{index}",
        prompt_len=10,
        output_len=output_len,
        issue_s=float(index),
        first_token_s=index + ttft_s,
        complete_s=index + ttft_s + tpot_s * (output_len - 1),
        error=error,
    )


def errors_of(rows) -> dict[tuple[str, str], float | None]:
    return {(row.latency, row.statistic): row.relative_error for row in rows}


def test_each_latency_is_compared_by_mean_median_and_p90():
    rows = compare_latencies([record(0, ttft_s=1.0)], [record(0, ttft_s=1.0)])
    assert [(row.latency, row.statistic) for row in rows] == [(a, b) for a in LATENCIES for b in STATISTICS]
    assert all(row.relative_error == 0.0 for row in rows)


def test_an_error_is_positive_where_the_simulation_says_longer():
    measured = [record(0, ttft_s=1.0, tpot_s=0.01), record(1, ttft_s=3.0, tpot_s=0.01)]
    simulated = [record(0, ttft_s=1.5, tpot_s=0.005), record(1, ttft_s=3.5, tpot_s=0.005)]
    errors = errors_of(compare_latencies(measured, simulated))
    assert errors["ttft_s", "mean"] == pytest.approx(0.25)
    assert errors["ttft_s", "p90"] == pytest.approx(3.3 / 2.8 - 1.0)
    assert errors["output_token_latency_s", "mean"] == pytest.approx(-0.5)
    assert errors["latency_s", "mean"] == pytest.approx((1.55 + 3.55) / (1.1 + 3.1) - 1.0)
    assert errors["input_token_latency_s", "mean"] == pytest.approx(0.25)
    assert errors["per_token_latency_s", "mean"] == pytest.approx((1.55 + 3.55) / (1.1 + 3.1) - 1.0)


def test_only_requests_that_succeeded_on_both_sides_count():
    measured = [record(0, ttft_s=1.0), record(1, ttft_s=9.0, error="aborted"), record(2, ttft_s=7.0)]
    simulated = [record(0, ttft_s=1.1), record(1, ttft_s=1.0), record(2, ttft_s=9.0, error="refused")]
    errors = errors_of(compare_latencies(measured, simulated))
    assert errors["ttft_s", "mean"] == pytest.approx(0.1)


def test_what_has_not_ended_on_one_side_is_left_out():
    errors = errors_of(compare_latencies([record(0, ttft_s=1.0)], [record(0, ttft_s=2.0), record(1, ttft_s=1.0)]))
    assert errors["ttft_s", "mean"] == pytest.approx(1.0)


def test_nothing_that_succeeded_is_nothing_to_compare():
    assert compare_latencies([], [record(0, ttft_s=1.0)]) == ()


def test_single_tokens_have_no_time_per_token_and_no_error_in_it():
    alone = [record(0, ttft_s=1.0, output_len=1)]
    assert errors_of(compare_latencies(alone, alone))["output_token_latency_s", "mean"] == 0.0


def test_a_latency_of_nothing_has_no_relative_error():
    rows = compare_latencies([record(0, ttft_s=1.0, tpot_s=0.0)], [record(0, ttft_s=1.0)])
    assert errors_of(rows)["output_token_latency_s", "mean"] is None


def test_iterations_are_compared_by_kind_and_degree_of_parallelism():
    # Predicted: 1 ms a token of an instance, and 10 ms a step.
    iterations = [
        traced_prefill(100, 0.2),
        traced_prefill(300, 0.2),
        traced_prefill(100, 0.05, dop=2),
        traced_decode(0.02, continues=False, turnaround_s=0.004),
        traced_decode(0.01, continues=True),
        traced_decode(0.03, continues=True, turnaround_s=0.002),
        traced_recovery(1.0),
    ]
    rows = {(row.kind, row.dop): row for row in compare_iterations(iterations, RoundModel(), 1)}
    assert set(rows) == {
        ("prefill", 1),
        ("prefill", 2),
        ("decode, begun", 1),
        ("decode, continued", 1),
        ("recover", 1),
    }
    prefill = rows["prefill", 1]
    assert (prefill.num_measured, prefill.measured_s) == (2, pytest.approx(0.2))
    assert prefill.predicted_s == pytest.approx(0.2)
    assert prefill.relative_error == pytest.approx(0.0)
    assert prefill.absolute_error == pytest.approx(0.5)
    assert prefill.turnaround_s is None
    assert rows["prefill", 2].relative_error == pytest.approx(0.0)
    assert rows["decode, begun", 1].relative_error == pytest.approx(-0.5)
    assert rows["decode, begun", 1].turnaround_s == pytest.approx(0.004)
    assert rows["decode, continued", 1].measured_s == pytest.approx(0.02)
    assert rows["decode, continued", 1].turnaround_s == pytest.approx(0.002)
    assert rows["recover", 1].relative_error is None
    assert rows["recover", 1].absolute_error is None


def test_spans_are_summed_up_by_steps():
    spans = [
        Span(kind="decode", group=Group((0,)), begin_s=0.0, end_s=0.6, num_requests=1, num_steps=3),
        Span(kind="decode", group=Group((1,)), begin_s=1.0, end_s=1.4, num_requests=1, num_steps=1),
        Span(kind="prefill", group=Group((0, 1)), begin_s=2.0, end_s=3.0, num_requests=4, num_steps=1),
    ]
    decode, prefill = summarize_spans(spans)
    assert (decode.kind, decode.dop, decode.num_simulated) == ("decode", 1, 4)
    assert decode.simulated_s == pytest.approx(0.25)
    assert (prefill.kind, prefill.dop, prefill.simulated_s) == ("prefill", 2, 1.0)


def comparison() -> ReplayComparison:
    measured, simulated = [record(0, ttft_s=1.0)], [record(0, ttft_s=1.05)]
    return ReplayComparison(
        host=HostTimes(turnaround_s=0.001),
        latencies=compare_latencies(measured, simulated),
        latencies_as_fitted=compare_latencies(measured, [record(0, ttft_s=0.5)]),
        latencies_in_hindsight=compare_latencies(measured, [record(0, ttft_s=1.01)]),
        iterations=compare_iterations([traced_prefill(100, 0.2), traced_recovery(1.0)], RoundModel(), 1),
        simulated_iterations=summarize_spans(
            [Span(kind="prefill", group=Group((0,)), begin_s=0.0, end_s=0.1, num_requests=1, num_steps=1)]
        ),
        elasticity=Elasticity(num_scale_ups=1, decode_steps_by_dop={1: 20, 2: 5}),
        simulated_elasticity=Elasticity(num_scale_ups=0, decode_steps_by_dop={}),
    )


def test_the_table_shows_both_sides_and_all_errors():
    lines = format_comparison(comparison()).splitlines()
    (ttft,) = [line for line in lines if line.startswith("time to first token") and "mean" in line]
    assert ttft.split()[-5:] == ["1000.000", "1050.000", "+5.0%", "-50.0%", "+1.0%"]
    (prefill,) = [line for line in lines if line.startswith("prefill  ")]
    assert prefill.split() == ["prefill", "1", "200.000", "100.000", "-50.0%", "1", "-"]
    assert "measured:  decode groups gained an instance 1 times; decode steps: 20 on DoP 1, 5 on DoP 2" in lines
    assert "simulated: decode groups gained an instance 0 times; decode steps: none" in lines
    (simulated,) = [line for line in lines if line.startswith("prefill, simulated")]
    assert simulated.split() == ["prefill,", "simulated", "1", "100.000", "1"]


def test_the_file_holds_numbers_errors_and_where_they_come_from(tmp_path):
    write_comparison(comparison(), {"commit": "0123abc"}, tmp_path / "comparison.json")
    written = json.loads((tmp_path / "comparison.json").read_text())
    assert written["about"] == {"commit": "0123abc"}
    assert written["host"]["turnaround_s"] == 0.001
    assert written["latencies"][0]["relative_error"] == pytest.approx(0.05)
    assert written["latencies_as_fitted"][0]["relative_error"] == pytest.approx(-0.5)
    assert written["latencies_in_hindsight"][0]["relative_error"] == pytest.approx(0.01)
    assert written["iterations"][0]["kind"] == "prefill"


def test_iterations_are_written_with_their_predictions_and_times_since_the_begin(tmp_path):
    write_iterations([traced_decode(0.02, continues=True)], RoundModel(), 1, 0.75, tmp_path / "iterations.jsonl")
    (row,) = map(json.loads, (tmp_path / "iterations.jsonl").read_text().splitlines())
    assert row["group"] == [0]
    assert (row["begin_s"], row["elapsed_s"], row["predicted_s"]) == pytest.approx((0.25, 0.02, 0.01))
    assert row["work"] == {"rows": [1], "keys": [9]}
