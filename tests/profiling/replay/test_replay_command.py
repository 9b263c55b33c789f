"""`loongjax replay` from its flags to its files, on a real engine of two virtual devices."""

import json
import pathlib
import signal
import subprocess
import sys

import pytest

from loongjax.errors import ConfigError
from loongjax_profiling.metrics import ServingMetrics
from loongjax_profiling.records import RequestRecord, read_records
from loongjax_profiling.replay.command import main
from loongjax_profiling.replay.config import ReplayConfig
from loongjax_profiling.replay.player import Player
from loongjax_profiling.simulate.assembly import make_workload

LENGTHS = [(0, 200, 5), (20, 30, 12), (45, 60, 3), (45, 250, 4), (300, 10, 20), (420, 120, 1)]
"""Milliseconds, prompt and output tokens of a trace."""
FLAGS = (
    *("--random-weights", "tiny", "--num-instances", "2", "--page-size", "4", "--num-slots", "512"),
    *("--max-num-batched-tokens", "128", "--max-num-seqs", "4", "--policy", "simple"),
    *("--prefill-tokens-per-instance", "64", "--num-calibration-requests", "3"),
)


@pytest.fixture(scope="module")
def trace(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("trace") / "trace.jsonl"
    rows = [{"timestamp": ms, "input_length": prompt, "output_length": output} for ms, prompt, output in LENGTHS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def replayed(trace, tmp_path_factory) -> pathlib.Path:
    """The folder of a replay that went well."""
    out = tmp_path_factory.mktemp("replayed") / "out"
    assert main([*FLAGS, "--trace", str(trace), "--commit", "0123abc", "--out", str(out)]) == 0
    return out


def comparison_in(out: pathlib.Path) -> dict:
    return json.loads((out / "comparison.json").read_text())


def asked_of(records: list[RequestRecord]) -> list[tuple[str, int, int, float]]:
    return [(record.request_id, record.prompt_len, record.output_len, record.issue_s) for record in records]


def test_both_sides_serve_the_same_requests_to_their_ends(replayed: pathlib.Path):
    measured, simulated = (read_records(replayed / f"{side}.jsonl") for side in ("measured", "simulated"))
    expected = [(f"request-{i}", prompt, out, ms / 1000.0) for i, (ms, prompt, out) in enumerate(LENGTHS)]
    assert asked_of(measured) == asked_of(simulated) == expected
    for record in (*measured, *simulated):
        assert record.error is None
        assert record.first_token_s is not None
        assert record.issue_s < record.first_token_s <= record.complete_s


def test_nothing_is_compiled_while_the_clock_runs(replayed: pathlib.Path):
    assert comparison_in(replayed)["about"]["num_recompiles"] == 0


def test_the_comparison_is_of_these_records(replayed: pathlib.Path):
    latencies = {(row["latency"], row["statistic"]): row for row in comparison_in(replayed)["latencies"]}
    for side in ("measured", "simulated"):
        metrics = ServingMetrics.of(read_records(replayed / f"{side}.jsonl")).as_json()
        for latency in ("ttft_s", "output_token_latency_s", "latency_s"):
            for statistic in ("mean", "p90"):
                assert latencies[latency, statistic][f"{side}_s"] == pytest.approx(metrics[latency][statistic])


def test_it_says_where_the_numbers_come_from(replayed: pathlib.Path):
    about = comparison_in(replayed)["about"]
    assert about["command"].startswith("loongjax replay --random-weights tiny")
    assert (about["commit"], about["policy"], about["hardware"]) == ("0123abc", "simple", "2 x cpu")
    assert about["cost_model_source"] == "roofline"
    assert about["cluster"]["num_slots"] == 512
    assert (about["num_sent"], about["num_ended"], about["num_failed"]) == (6, 6, 0)
    assert not about["is_interrupted"]


def test_every_iteration_of_the_engine_is_written_down(replayed: pathlib.Path):
    rows = [json.loads(line) for line in (replayed / "iterations.jsonl").read_text().splitlines()]
    num_prefilled = sum(sum(row["work"]["new_lens"]) for row in rows if row["kind"] == "prefill")
    num_decoded = sum(sum(row["work"]["rows"]) for row in rows if row["kind"] == "decode")
    assert num_prefilled == sum(prompt for _, prompt, _ in LENGTHS)
    assert num_decoded == sum(output - 1 for _, _, output in LENGTHS)
    assert {len(row["group"]) for row in rows if row["kind"] == "prefill"} == {1, 2}
    for row in rows:
        assert 0.0 <= row["submitted_s"] <= row["begin_s"] <= row["end_s"]
    by_kind = comparison_in(replayed)["iterations"]
    assert sum(row["num_measured"] for row in by_kind) == len(rows)


def test_both_sides_tell_their_decode_steps_by_degree_of_parallelism(replayed: pathlib.Path):
    comparison = comparison_in(replayed)
    sides = {
        "elasticity": [(row["dop"], row["num_measured"]) for row in comparison["iterations"] if "dec" in row["kind"]],
        "simulated_elasticity": [
            (row["dop"], row["num_simulated"]) for row in comparison["simulated_iterations"] if row["kind"] == "decode"
        ],
    }
    for side, steps in sides.items():
        assert comparison[side]["num_scale_ups"] >= 0
        by_dop = comparison[side]["decode_steps_by_dop"]
        for dop in {dop for dop, _ in steps}:
            assert by_dop[str(dop)] == sum(num_steps for other, num_steps in steps if other == dop)
        assert sum(by_dop.values()) == sum(num_steps for _, num_steps in steps)
    assert comparison["about"]["predicted_over_actual"] == {}, "this policy predicts nothing"


def test_the_host_was_measured_on_other_requests(replayed: pathlib.Path):
    host = comparison_in(replayed)["host"]
    assert all(0.0 <= each_s < 10.0 for each_s in host.values())
    assert min(host["intake_s"], host["turnaround_s"], host["telling_s"]) > 0.0


def test_ctrl_c_keeps_and_compares_what_had_ended(trace, tmp_path, monkeypatch):
    play = Player.play

    def interrupted_after_three(self, requests, **settings):
        self._on_end = lambda: signal.raise_signal(signal.SIGINT) if len(self._records) == 3 else None
        return play(self, requests, **settings)

    monkeypatch.setattr(Player, "play", interrupted_after_three)
    with pytest.raises(KeyboardInterrupt):
        main([*FLAGS, "--trace", str(trace), "--num-calibration-requests", "0", "--out", str(tmp_path)])
    records = read_records(tmp_path / "measured.jsonl")
    assert len(records) >= 3
    comparison = comparison_in(tmp_path)
    assert comparison["about"]["is_interrupted"]
    assert comparison["about"]["num_ended"] == len(records)
    assert comparison["latencies"]


def test_without_a_warm_up_compilations_are_counted(trace, tmp_path):
    # A pool of another size has programs of its own.
    flags = ("--num-slots", "264", "--warm-up", "False", "--num-requests", "1", "--num-calibration-requests", "0")
    assert main([*FLAGS, *flags, "--trace", str(trace), "--out", str(tmp_path)]) == 0
    assert comparison_in(tmp_path)["about"]["num_recompiles"] > 0


def test_a_request_that_fails_is_told_and_says_why(tmp_path, capsys):
    trace, rows = tmp_path / "trace.jsonl", [(0, 20, 2), (1, 2000, 2)]
    lines = [json.dumps({"timestamp": ms, "input_length": size, "output_length": out}) for ms, size, out in rows]
    trace.write_text("\n".join(lines))
    flags = ("--num-calibration-requests", "0", "--warm-up", "False")
    assert main([*FLAGS, *flags, "--trace", str(trace), "--out", str(tmp_path / "out")]) == 1
    told = capsys.readouterr().out
    assert "played 2 of 2 requests, 1 failed" in told
    assert "the first that failed: the maximum context length is" in told


def test_the_workload_is_that_of_a_simulation():
    config = ReplayConfig(workload="zipf", rate=3.0, num_requests=40, seed=5)
    assert len(make_workload(config)) == 40
    assert make_workload(config) == make_workload(ReplayConfig(workload="zipf", rate=3.0, num_requests=40, seed=5))


def test_all_of_a_trace_is_played_and_else_a_minute_or_so(trace: pathlib.Path):
    assert len(make_workload(ReplayConfig(rate=1.0))) == 60
    assert len(make_workload(ReplayConfig(trace=trace))) == len(LENGTHS)
    assert [request.prompt_len for request in make_workload(ReplayConfig(trace=trace, num_requests=2))] == [200, 30]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"random_weights": "tiny", "checkpoint": "."}, "two models"),
        ({"limit_s": 0.0}, "--limit-s"),
        ({"num_requests": 0}, "--num-requests"),
        ({"num_calibration_requests": -1}, "--num-calibration-requests"),
        ({"policy": "best"}, "--policy"),
        ({"page_size": 3}, "--page-size"),
    ],
)
def test_settings_that_cannot_work_are_refused(fields: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        ReplayConfig(**fields)  # pyright: ignore[reportArgumentType]


def test_a_cost_model_that_cannot_be_read_is_told_before_anything_is_built(trace, tmp_path, monkeypatch):
    monkeypatch.setattr("loongjax_profiling.replay.engine.build_random_runtime", lambda *args: pytest.fail("built"))
    with pytest.raises(ConfigError, match=r"missing\.json cannot be read"):
        main([*FLAGS, "--trace", str(trace), "--cost-model", str(tmp_path / "missing.json"), "--out", str(tmp_path)])


def test_a_folder_that_cannot_be_made_is_told_before_anything_is_built(trace, tmp_path, monkeypatch):
    monkeypatch.setattr("loongjax_profiling.replay.engine.build_random_runtime", lambda *args: pytest.fail("built"))
    (tmp_path / "plain").touch()
    with pytest.raises(ConfigError, match="cannot be made"):
        main([*FLAGS, "--trace", str(trace), "--out", str(tmp_path / "plain")])


@pytest.mark.parametrize("flag", ["--out", "--explain"])
def test_a_trace_is_not_written_over(trace, tmp_path, monkeypatch, flag):
    monkeypatch.setattr("loongjax_profiling.replay.engine.build_random_runtime", lambda *args: pytest.fail("built"))
    copy = tmp_path / "measured.jsonl"
    copy.write_bytes(trace.read_bytes())
    target = tmp_path if flag == "--out" else copy
    with pytest.raises(ConfigError, match=rf"{flag} .*measured\.jsonl is the file of --trace"):
        main([*FLAGS, "--trace", str(copy), flag, str(target)])
    assert copy.read_bytes() == trace.read_bytes()


def test_help_names_the_flags_and_needs_no_jax():
    script = """
import atexit, sys
atexit.register(lambda: print("jax" in sys.modules))
from loongjax_profiling.replay.command import main
main(["--help"])
"""
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert "--num-calibration-requests" in printed.stdout
    assert printed.stdout.strip().endswith("False")
