"""The search for the highest rate, and the comparison with the paper."""

import dataclasses
import json
import math
import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loongjax.errors import ConfigError
from loongjax_profiling.records import RequestRecord
from loongjax_profiling.simulate import paper
from loongjax_profiling.simulate.command import main
from loongjax_profiling.simulate.goodput import highest_rate, keeps_up, least_attainment
from loongjax_profiling.simulate.paper import DATASETS, ZIPF_GOODPUT, PaperConfig, paper_system, zipf_wish
from loongjax_profiling.simulate.workload.request import WorkloadRequest


@given(limit=st.floats(1e-3, 1e4), start=st.floats(1e-2, 1e3))
def test_it_finds_the_limit_wherever_it_begins(limit: float, start: float):
    found = highest_rate(lambda rate: rate <= limit, start=start, precision=0.01)
    assert found <= limit <= found * 1.01 * (1 + 1e-9)


def test_what_never_holds_has_rate_zero_and_what_always_holds_comes_to_an_end():
    assert highest_rate(lambda rate: False, start=1.0) == 0.0
    assert highest_rate(lambda rate: True, start=1.0) > 1e6


@pytest.mark.parametrize(("start", "precision"), [(0.0, 0.1), (1.0, 0.0), (float("inf"), 0.1)])
def test_a_search_that_cannot_end_is_refused(start: float, precision: float):
    with pytest.raises(ConfigError):
        highest_rate(lambda rate: True, start=start, precision=precision)


def served(prompt_len: int, ttft_s: float) -> RequestRecord:
    return RequestRecord(
        request_id=f"{prompt_len}",
        prompt_len=prompt_len,
        output_len=1,
        issue_s=0.0,
        first_token_s=ttft_s,
        complete_s=ttft_s,
        ttft_slo_s=1.0,
    )


def test_long_prompts_that_wait_without_end_show_in_their_own_class():
    records = [served(prompt_len, ttft_s=0.5 if prompt_len <= 90 else 999.0) for prompt_len in range(100, 0, -1)]
    assert [least_attainment(records, count) for count in (1, 2, 5, 10)] == [0.9, 0.8, 0.5, 0.0]


@pytest.mark.parametrize(("last_end_s", "expected"), [(109.0, True), (110.0, True), (111.0, False)])
def test_a_system_keeps_up_if_all_have_ended_soon_after_the_last_came(last_end_s: float, expected: bool):
    def came(issue_s: float, complete_s: float) -> RequestRecord:
        return dataclasses.replace(served(10, 0.0), issue_s=issue_s, complete_s=complete_s)

    records = [came(0.0, last_end_s), came(100.0, 101.0), came(50.0, 60.0)]
    assert keeps_up(records, 0.1) is expected
    assert keeps_up(records, math.inf)
    assert keeps_up([], 0.1)


def test_with_fewer_requests_than_classes_each_is_its_own():
    assert least_attainment([served(1, 0.5), served(2, 2.0)], 10) == 0.0
    assert least_attainment([served(1, 0.5)], 10) == 1.0
    assert least_attainment([], 10) == 1.0


def test_wishes_are_the_papers():
    short = zipf_wish(WorkloadRequest(arrival_s=0.0, prompt_len=100, output_len=1))
    assert (short.ttft_s, short.tpot_s) == (15.0, 0.05)
    long = zipf_wish(WorkloadRequest(arrival_s=0.0, prompt_len=199_999, output_len=1))
    # 25 times the published form's 0.034 s + 1.02e-5 s a token + 1.93e-10 s a token squared.
    assert long.ttft_s == pytest.approx(25 * (0.034 + 1.02e-5 * 2e5 + 1.93e-10 * 4e10), rel=0.01)


def test_every_system_of_the_paper_can_be_built():
    names = {name for rates in ZIPF_GOODPUT.values() for name in rates}
    names |= {name for dataset in DATASETS.values() for name in dataset.capacity}
    for name in names:
        assert paper_system(name).cluster.num_instances in (1, 4)  # pyright: ignore[reportArgumentType]


def test_scale_up_can_be_left_out_of_the_comparison_to_see_what_it_is_worth():
    whole, without = paper_system("esp").scheduling, paper_system("esp-no-scale-up").scheduling
    assert (whole.scale_up, without.scale_up) == (True, False)
    assert dataclasses.replace(without, scale_up=True) == whole


def test_prompts_are_cut_into_the_papers_chunks():
    chunks = {name: dataset.chunk_tokens for name, dataset in DATASETS.items()}
    assert chunks == {"sharegpt": 256, "leval": 2048, "lv-eval": 16_384, "mixed": 2048}
    scheduling = paper_system("chunked-tp8", 256).scheduling
    assert (scheduling.policy, scheduling.max_extend_tokens) == ("chunked", 256)
    assert paper_system("chunked-tp8").scheduling.max_extend_tokens == 512


def test_the_command_prints_the_rates_beside_the_papers_and_writes_them(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "zipf.json"
    flags = [
        "--alphas",
        "1.0",
        "--systems",
        "static-tp8",
        "replicated-tp2x4",
        "--duration-s",
        "2",
        "--precision",
        "0.9",
    ]
    assert main(["paper-zipf", *flags, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "replicated-tp2x4" in printed
    assert "0.360" in printed
    assert "1.00x" not in printed, "nobody is compared to a system that did not run"
    rows = json.loads(out.read_text())["rows"]
    assert [row["system"] for row in rows] == ["static-tp8", "replicated-tp2x4"]
    assert all(row["rate"] > 0.1 for row in rows)


def test_datasets_are_compared_too(capsys: pytest.CaptureFixture[str]):
    flags = ["--datasets", "lv-eval", "--systems", "static-tp8", "--duration-s", "10", "--precision", "0.9"]
    assert main(["paper-datasets", *flags]) == 0
    assert "lv-eval" in capsys.readouterr().out


@pytest.mark.parametrize(
    "fields", [{"duration_s": 0.0}, {"duration_s": float("inf")}, {"precision": float("nan")}, {"seeds": ()}]
)
def test_a_comparison_without_time_or_requests_is_refused(fields):
    with pytest.raises(ConfigError):
        PaperConfig(**fields)


def test_a_rate_is_the_median_of_those_of_each_seed(tmp_path: pathlib.Path):
    out = tmp_path / "figure12.json"
    flags = ["--alphas", "1.4", "--systems", "static-tp8", "--duration-s", "2", "--precision", "0.3"]
    alone = []
    for seed in range(3):
        assert main(["paper-zipf", *flags, "--seeds", str(seed), "--out", str(out)]) == 0
        alone.append(json.loads(out.read_text())["rows"][0]["rate"])
    assert main(["paper-zipf", *flags, "--seeds", "0", "1", "2", "--out", str(out)]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert row["rates"] == alone
    assert row["rate"] == sorted(alone)[1]


def test_what_was_found_before_ctrl_c_is_written_and_esp_comes_first(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    rates = iter([2.0, 0.5])

    def found(*_, **__) -> list[float]:
        try:
            return [next(rates)]
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(paper, "sustained_rates", found)
    out = tmp_path / "figure10.json"
    flags = ["--datasets", "leval", "--systems", "static-tp8", "replicated-tp2x4", "esp", "--out", str(out)]
    with pytest.raises(KeyboardInterrupt):
        main(["paper-datasets", *flags])
    rows = json.loads(out.read_text())["rows"]
    assert [(row["system"], row["rate"]) for row in rows] == [("esp", 2.0), ("static-tp8", 0.5)]
    assert "4.00x" in capsys.readouterr().out
