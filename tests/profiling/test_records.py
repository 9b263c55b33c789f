"""What is kept of a request, and what a benchmark comes to."""

import json
import math
import pathlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loongjax.errors import ConfigError
from loongjax_profiling.metrics import Distribution, ServingMetrics
from loongjax_profiling.records import RequestRecord, read_records, write_records


def record(**fields: object) -> RequestRecord:
    values: dict[str, object] = {
        "request_id": "a",
        "prompt_len": 100,
        "output_len": 11,
        "issue_s": 1.0,
        "first_token_s": 3.0,
        "complete_s": 8.0,
    }
    return RequestRecord(**(values | fields))  # pyright: ignore[reportArgumentType]


def test_latencies_follow_from_the_three_times():
    assert (record().ttft_s, record().tpot_s, record().latency_s) == (2.0, 0.5, 7.0)


def test_a_single_token_takes_no_time_per_output_token():
    assert record(output_len=1, complete_s=3.0).tpot_s == 0.0


def test_without_a_token_there_is_no_time_to_it():
    assert record(first_token_s=None).ttft_s is None
    assert record(first_token_s=None).tpot_s is None


@pytest.mark.parametrize(
    ("fields", "meets"),
    [
        ({}, True),
        ({"ttft_slo_s": 2.0, "tpot_slo_s": 0.5}, True),
        ({"ttft_slo_s": 1.9}, False),
        ({"tpot_slo_s": 0.4}, False),
        ({"error": "no"}, False),
        ({"first_token_s": None}, False),
    ],
)
def test_a_request_meets_its_wishes_if_it_got_all_of_them(fields: dict[str, object], meets: bool):
    assert record(**fields).meets_slo is meets


@given(
    st.lists(
        st.builds(
            RequestRecord,
            request_id=st.text(),
            prompt_len=st.integers(1, 10**6),
            output_len=st.integers(0, 10**4),
            issue_s=st.floats(0, 1e6),
            first_token_s=st.none() | st.floats(0, 1e6),
            complete_s=st.floats(0, 1e6),
            ttft_slo_s=st.none() | st.floats(1e-3, 10),
            tpot_slo_s=st.none() | st.floats(1e-3, 10),
            error=st.none() | st.text(),
        ),
        max_size=5,
    )
)
def test_records_come_back_from_their_file_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, records: list[RequestRecord]
):
    path = tmp_path_factory.mktemp("records") / "records.jsonl"
    write_records(records, path)
    assert read_records(path) == records


def test_others_find_the_latencies_in_the_file_too(tmp_path: pathlib.Path):
    write_records([record()], tmp_path / "r.jsonl")
    (row,) = map(json.loads, (tmp_path / "r.jsonl").read_text().splitlines())
    assert (row["ttft_s"], row["tpot_s"], row["latency_s"]) == (2.0, 0.5, 7.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "line 1 is no JSON"),
        ("3", "line 1 lacks request_id"),
        ('\n{"request_id": "a"}', "line 2 lacks prompt_len"),
    ],
)
def test_a_line_that_is_no_record_is_named(tmp_path: pathlib.Path, text: str, said: str):
    path = tmp_path / "r.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_records(path)


def test_a_file_that_is_not_there_is_named(tmp_path: pathlib.Path):
    with pytest.raises(ConfigError, match="nowhere"):
        read_records(tmp_path / "nowhere")


def test_metrics_are_means_of_each_requests_own_ratios():
    records = [record(), record(prompt_len=10, output_len=2, issue_s=2.0, complete_s=5.0)]
    metrics = ServingMetrics.of(records)
    assert metrics.duration_s == 7.0
    assert metrics.request_throughput == pytest.approx(2 / 7)
    assert metrics.input_throughput == pytest.approx(110 / 7)
    assert metrics.output_throughput == pytest.approx(13 / 7)
    per_token, per_input, per_output = (
        metrics.per_token_latency_s,
        metrics.input_token_latency_s,
        metrics.output_token_latency_s,
    )
    assert per_token is not None
    assert per_input is not None
    assert per_output is not None
    assert per_token.mean == pytest.approx((7 / 111 + 3 / 12) / 2)
    assert per_input.mean == pytest.approx((2 / 100 + 1 / 10) / 2)
    assert per_output.mean == pytest.approx((0.5 + 2.0) / 2)


def test_goodput_counts_those_that_met_their_wishes_and_attainment_is_their_part():
    records = [record(ttft_slo_s=5.0), record(ttft_slo_s=1.0), record(error="refused", first_token_s=None)]
    metrics = ServingMetrics.of(records)
    assert metrics.num_failed == 1
    assert metrics.slo_attainment == pytest.approx(1 / 3)
    assert metrics.goodput == pytest.approx(1 / 7)


def test_failed_requests_have_no_latency():
    metrics = ServingMetrics.of([record(error="refused", first_token_s=None)])
    assert metrics.ttft_s is None
    assert metrics.request_throughput == 0.0


def test_nothing_at_all_is_no_division_by_zero():
    assert ServingMetrics.of([]).request_throughput == 0.0


@given(st.lists(st.floats(0.0, 1e3), min_size=1, max_size=50))
def test_percentiles_agree_with_sorting(values: list[float]):
    distribution = Distribution.of(values)
    assert distribution is not None
    assert distribution.max == max(values)
    assert distribution.mean == pytest.approx(math.fsum(values) / len(values))
    for share, value in ((0.5, distribution.p50), (0.9, distribution.p90), (0.99, distribution.p99)):
        position = share * (len(values) - 1)
        below, above = sorted(values)[math.floor(position)], sorted(values)[math.ceil(position)]
        assert below - 1e-9 <= value <= above + 1e-9


def test_metrics_can_be_written_as_json():
    assert json.loads(json.dumps(ServingMetrics.of([record()]).as_json()))["num_requests"] == 1
    assert np.isfinite(ServingMetrics.of([record()]).goodput)
