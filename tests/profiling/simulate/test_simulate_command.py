"""`loongjax simulate` from its flags to its files."""

import dataclasses
import json
import logging
import pathlib

import pytest

from loongjax.core.cluster import Group
from loongjax.costmodel.fit import fit
from loongjax.costmodel.measurement import Provenance
from loongjax.costmodel.model import FittedModel
from loongjax.costmodel.model_file import save
from loongjax.costmodel.work import PrefillTotals, Strategy
from loongjax.errors import ConfigError, EngineError
from loongjax.runtime.simulated import Span
from loongjax_profiling.metrics import ServingMetrics
from loongjax_profiling.model_shapes import MODEL_SHAPES
from loongjax_profiling.records import RequestRecord, read_records
from loongjax_profiling.simulate.a800 import a800_model
from loongjax_profiling.simulate.assembly import choose_cluster, choose_cost_model, make_workload
from loongjax_profiling.simulate.command import main
from loongjax_profiling.simulate.config import ClusterName, SimulateConfig
from loongjax_profiling.simulate.report import summary
from loongjax_profiling.simulate.timeline import Timeline
from tests.costmodel.shapes import measurements

FLAGS = ["--cost-model", "a800", "--workload", "sharegpt", "--rate", "4", "--num-requests", "12", "--policy", "simple"]
PNG = b"\x89PNG"


def run(tmp_path: pathlib.Path, *flags: str) -> pathlib.Path:
    out = tmp_path / "out"
    assert main([*FLAGS, *flags, "--out", str(out)]) == 0
    return out


def test_it_writes_records_metrics_and_a_picture(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    out = run(tmp_path)
    records = read_records(out / "records.jsonl")
    metrics = json.loads((out / "metrics.json").read_text())
    assert len(records) == metrics["num_requests"] == 12
    assert metrics["ttft_s"]["p90"] == ServingMetrics.of(records).as_json()["ttft_s"]["p90"]
    assert metrics["about"]["policy"] == "simple"
    assert metrics["about"]["cost_model_source"] == "fitted"
    assert (out / "timeline.png").read_bytes().startswith(PNG)
    printed = capsys.readouterr().out
    assert "12 requests" in printed
    num_decoded = sum(record.output_len - 1 for record in records)
    num_steps = sum(metrics["decode_steps_by_dop"].values())
    assert 0 < max(record.output_len - 1 for record in records) <= num_steps <= num_decoded
    assert f"decode groups gained an instance {metrics['num_scale_ups']} times" in printed


def test_the_same_seed_writes_the_same_files_step_by_step_or_not(tmp_path: pathlib.Path):
    few = ("--timeline-s", "0", "--num-requests", "3")
    first = run(tmp_path / "a", *few)
    second = run(tmp_path / "b", *few, "--step-by-step")
    other = run(tmp_path / "c", *few, "--seed", "1")
    assert (first / "records.jsonl").read_bytes() == (second / "records.jsonl").read_bytes()
    assert (first / "records.jsonl").read_bytes() != (other / "records.jsonl").read_bytes()
    assert not (first / "timeline.png").exists()


def test_a_trace_is_played_instead_of_a_distribution(tmp_path: pathlib.Path):
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"timestamp": 500, "input_length": 300, "output_length": 7, "hash_ids": [1]}\n')
    (record,) = read_records(run(tmp_path, "--trace", str(trace)) / "records.jsonl")
    assert (record.issue_s, record.prompt_len, record.output_len) == (0.5, 300, 7)


def test_a_part_of_a_trace_is_said_to_be_one(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    trace = tmp_path / "trace.jsonl"
    rows = [{"timestamp": 1000 * time, "input_length": 300, "output_length": 7} for time in (5, 2, 4)]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = run(tmp_path, "--trace", str(trace), "--num-requests", "2", "--timeline-s", "0")
    assert [record.issue_s for record in read_records(out / "records.jsonl")] == [2.0, 4.0]
    assert "the first 2 of 3 requests" in capsys.readouterr().out


def test_json_that_is_too_deep_is_refused(tmp_path: pathlib.Path):
    deep = tmp_path / "deep.json"
    deep.write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(ConfigError, match=r"deep\.json, line 1 is no JSON"):
        main([*FLAGS, "--trace", str(deep), "--out", str(tmp_path / "out")])
    with pytest.raises(ConfigError, match=r"--host .*deep\.json cannot be read"):
        main([*FLAGS, "--host", str(deep), "--out", str(tmp_path / "out")])


@pytest.mark.parametrize("flag", ["--ttft-slo-s", "--tpot-slo-s"])
def test_the_shortest_wish_is_served_and_shorter_ones_are_refused(tmp_path: pathlib.Path, flag: str):
    few = ("--policy", "esp", "--num-requests", "5", "--timeline-s", "0", "--rate", "50")
    assert len(read_records(run(tmp_path, *few, flag, "1e-6") / "records.jsonl")) == 5
    with pytest.raises(ConfigError, match=rf"{flag} must be .* at least 1e-06, got 1e-310"):
        run(tmp_path, *few, flag, "1e-310")


def test_a_fitted_file_gives_the_times(tmp_path: pathlib.Path):
    save(a800_model(), tmp_path / "model.json")
    built_in = run(tmp_path / "a", "--timeline-s", "0")
    from_file = run(tmp_path / "b", "--timeline-s", "0", "--cost-model", str(tmp_path / "model.json"))
    assert (built_in / "records.jsonl").read_bytes() == (from_file / "records.jsonl").read_bytes()


def test_a_model_that_lacks_a_group_size_is_refused_before_anything_runs(tmp_path: pathlib.Path):
    """Three instances work together now and then, which is found out late."""
    whole = a800_model()
    without = {strategy: times for strategy, times in whole.strategies.items() if strategy != Strategy(3, 2)}
    save(dataclasses.replace(whole, strategies=without), tmp_path / "model.json")
    flags = ("--cost-model", str(tmp_path / "model.json"))
    with pytest.raises(ConfigError, match=r"simple on 4 instances of tp=2 .* knows nothing of sp3 tp2, only of sp1"):
        run(tmp_path, *flags)
    assert not (tmp_path / "out").exists()
    assert run(tmp_path, *flags, "--policy", "replicated"), "one instance at a time"
    assert run(tmp_path, *flags, "--num-instances", "4", "--pod-size", "2"), "two at a time"


def test_a_model_without_migrations_is_refused_where_keys_have_to_move(tmp_path: pathlib.Path):
    save(dataclasses.replace(a800_model(), migration=None), tmp_path / "model.json")
    flags = ("--cost-model", str(tmp_path / "model.json"))
    with pytest.raises(ConfigError, match=r"disaggregated on 4 .* has no migration time"):
        run(tmp_path, *flags, "--policy", "disaggregated")
    assert run(tmp_path, *flags)


def test_what_a_fitted_model_was_measured_on_is_told_instead_of_the_rooflines_flags(tmp_path: pathlib.Path):
    about = json.loads((run(tmp_path, "--timeline-s", "0") / "metrics.json").read_text())["about"]
    assert about["cost_model_provenance"]["hardware"].startswith("8 x A800")
    assert about["device"] is about["model"] is None
    assert about["is_complete"] is True


@pytest.mark.parametrize("reason", [KeyboardInterrupt(), EngineError("the engine broke")])
def test_ctrl_c_or_an_error_in_the_middle_keeps_who_has_ended(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], reason: BaseException
):
    whole = read_records(run(tmp_path / "whole") / "records.jsonl")
    spans = []

    def stop_in_the_middle(self: Timeline, span: Span):
        spans.append(span)
        if len(spans) == 15:
            raise reason

    monkeypatch.setattr(Timeline, "note", stop_in_the_middle)
    with pytest.raises(type(reason)):
        run(tmp_path)
    kept = read_records(tmp_path / "out" / "records.jsonl")
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert 0 < len(kept) < 12
    assert [record for record in whole if record in kept] == kept, "in order of arrival, as if never stopped"
    assert metrics["num_requests"] == len(kept)
    assert metrics["about"]["is_complete"] is False
    assert sum(metrics["decode_steps_by_dop"].values()) > 0
    assert f"has {len(kept)} of 12 requests" in capsys.readouterr().out


def test_all_of_it_can_be_drawn_and_any_reader_of_json_takes_the_metrics(tmp_path: pathlib.Path):
    out = run(tmp_path, "--timeline-s", "inf")
    assert (out / "timeline.png").read_bytes().startswith(PNG)
    metrics = json.loads((out / "metrics.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert metrics["about"]["timeline_s"] is None


def test_chunks_of_prompts_are_drawn_too(tmp_path: pathlib.Path):
    assert (run(tmp_path, "--policy", "chunked") / "timeline.png").read_bytes().startswith(PNG)


def test_the_summary_says_why_requests_failed_and_speaks_of_wishes_only_if_there_were_any(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
    run(tmp_path, "--timeline-s", "0", "--max-model-len", "16", "--num-requests", "3")
    printed = capsys.readouterr().out
    assert "3 failed" in printed
    assert "the first that failed: the whole cluster cannot hold" in printed
    assert "wishes" not in printed
    run(tmp_path / "wishes", "--timeline-s", "0", "--num-requests", "3", "--ttft-slo-s", "100")
    assert "100.00 % met their wishes" in capsys.readouterr().out


def test_large_times_do_not_run_into_each_other():
    record = RequestRecord(
        request_id="request-0", prompt_len=1, output_len=2, issue_s=0.0, first_token_s=5e7, complete_s=9e7
    )
    rows = summary([record]).splitlines()[-5:]
    assert all(len(row.split()[-5:]) == 5 and float(row.split()[-5]) > 0.0 for row in rows)


def test_without_a_cost_model_it_says_that_times_are_estimates(caplog: pytest.LogCaptureFixture):
    config = SimulateConfig(device="H200", model="llama3-8b")
    with caplog.at_level(logging.WARNING):
        assert choose_cost_model(config, choose_cluster(config)).source == "roofline"
    assert "roofline of H200 for llama3-8b" in caplog.text


def test_a_device_whose_rates_are_not_known_is_refused_with_those_that_are():
    config = SimulateConfig(device="nope")
    with pytest.raises(ConfigError, match="--device must be one of H200, H100, A100, A800, got 'nope'"):
        choose_cost_model(config, choose_cluster(config))
    with_times = SimulateConfig(device="nope", cost_model="a800")
    assert choose_cost_model(with_times, choose_cluster(with_times)).source == "fitted"


@pytest.mark.parametrize(
    ("flags", "device", "model"),
    [
        ((), "A800", "llama2-7b"),
        (("--cluster", "h200-8xtp1"), "H200", "llama3-8b"),
        (("--cluster", "h200-8xtp1", "--device", "H100"), "H100", "llama3-8b"),
        (("--cluster", "a800-1xtp8", "--model", "llama3-8b"), "A800", "llama3-8b"),
    ],
)
def test_an_estimate_is_of_the_clusters_device_and_model_unless_others_are_named(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, flags: tuple[str, ...], device: str, model: str
):
    few = ("--policy", "static", "--num-requests", "2", "--timeline-s", "0", "--out", str(tmp_path))
    assert main([*few, *flags]) == 0
    assert f"roofline of {device} for {model};" in caplog.text
    about = json.loads((tmp_path / "metrics.json").read_text())["about"]
    assert (about["device"], about["model"]) == (device, model)


def test_a_cost_model_of_another_device_or_model_than_the_clusters_is_warned_of(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
):
    def warnings(name: str, cluster: ClusterName, num_slots: int | None = None) -> str:
        caplog.clear()
        config = SimulateConfig(cost_model=name, cluster=cluster, num_slots=num_slots)
        choose_cost_model(config, choose_cluster(config))
        return caplog.text

    eight_h200 = Provenance(hardware="8 x NVIDIA H200", model=MODEL_SHAPES["llama3-8b"])
    name = str(tmp_path / "model.json")
    save(dataclasses.replace(a800_model(), provenance=eight_h200), tmp_path / "model.json")
    assert warnings("a800", "a800-4xtp2") == warnings(name, "h200-8xtp1") == ""
    other = warnings(name, "a800-1xtp8")
    assert (
        "is of 8 x NVIDIA H200 with llama3-8b, and --cluster a800-1xtp8 has the memory of A800 with llama2-7b" in other
    )
    assert "is of 8 x A800" in warnings("a800", "h200-8xtp1")
    assert warnings(name, "a800-1xtp8", 1600) == "", "then the memory is not the preset's"
    tiny = dataclasses.replace(eight_h200, model=dataclasses.replace(eight_h200.model, num_layers=3))
    save(dataclasses.replace(a800_model(), provenance=tiny), tmp_path / "model.json")
    assert "with a model of another shape" in warnings(name, "h200-8xtp1")


def test_flags_of_the_estimate_beside_a_cost_model_are_said_to_be_idle(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
):
    run(tmp_path, "--device", "H200", "--model", "llama2-7b", "--timeline-s", "0")
    (warned,) = caplog.messages
    assert warned == "not read: --device H200 --model llama2-7b; the times are those of --cost-model a800"


def test_settings_that_the_policy_does_not_read_are_told_once_however_many_pods_there_are(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
):
    unread = ("--no-scale-up", "--admission", "worst-case", "--num-prefill-instances", "9", "--chunk-tokens", "7")
    run(tmp_path, *unread, "--pod-size", "2", "--timeline-s", "0", "--explain", str(tmp_path / "why.jsonl"))
    (said,) = caplog.messages
    assert said.startswith("the policy simple does not read scale_up=False, admission='worst-case', explain='")
    assert said.endswith("chunk_tokens=7, num_prefill_instances=9")


def test_a_models_times_are_those_of_an_engine_that_pads_as_this_cluster_does(tmp_path: pathlib.Path):
    """Measured where 5,000 tokens were computed as 16,384; here they are 5,120."""
    fitted = fit(measurements((Strategy(1),)))
    save(fitted, tmp_path / "model.json")
    config = SimulateConfig(cost_model=str(tmp_path / "model.json"), max_num_batched_tokens=8192, max_num_seqs=16)
    model = choose_cost_model(config, choose_cluster(config))
    assert isinstance(model, FittedModel)
    whole = PrefillTotals.of_batch(5_000, 25_000_000)
    form = fitted.times(Strategy(1)).refined_prefill
    assert form is not None
    saved_s = fitted.prefill_s(Strategy(1), whole) - model.prefill_s(Strategy(1), whole)
    assert saved_s == pytest.approx((16_384 - 5_120) * form.per_padded_token_s)
    assert model.times(Strategy(1)).decode.row_buckets == (1, 4, 16)


def test_flags_change_the_preset_one_by_one():
    cluster = choose_cluster(SimulateConfig(cluster="a800-4xtp2", num_instances=64, num_slots=160_000))
    assert (cluster.num_instances, cluster.tp, cluster.num_slots, cluster.page_size) == (64, 2, 160_000, 16)


@pytest.mark.parametrize("workload", ["sharegpt", "leval", "lv-eval", "mixed", "zipf", "mooncake"])
def test_every_workload_has_a_name(workload: str):
    requests = make_workload(SimulateConfig(workload=workload, num_requests=30, rate=3.0))  # pyright: ignore[reportArgumentType]
    assert len(requests) == 30
    assert requests[-1].arrival_s == pytest.approx(10.0)


@pytest.mark.parametrize(
    "fields",
    [{"num_requests": 0}, {"timeline_s": -1.0}, {"timeline_s": float("nan")}, {"policy": "best"}, {"seed": -1}],
)
def test_settings_that_cannot_work_are_refused(fields: dict[str, object]):
    with pytest.raises(ConfigError):
        SimulateConfig(**fields)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", ["num_instances", "tp", "num_slots", "page_size", "max_num_seqs", "max_model_len"])
def test_a_cluster_of_nothing_is_refused_and_not_taken_for_the_preset(name: str):
    with pytest.raises(ConfigError, match=f"{name} of a cluster must be at least 1, got 0"):
        choose_cluster(SimulateConfig(**{name: 0}))  # pyright: ignore[reportArgumentType]


def test_a_folder_that_cannot_be_made_is_said_before_the_simulation(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    def never(*args: object, **settings: object):
        raise AssertionError("it simulated")

    monkeypatch.setattr("loongjax_profiling.simulate.simulation.simulate", never)
    (tmp_path / "plain").touch()
    with pytest.raises(ConfigError, match=r"--out .*plain cannot be made"):
        main(["--num-requests", "2", "--out", str(tmp_path / "plain")])


@pytest.mark.parametrize("flag", ["--out", "--explain"])
def test_a_trace_is_not_written_over(tmp_path: pathlib.Path, flag: str):
    trace = tmp_path / "records.jsonl"
    trace.write_text(line := '{"timestamp": 0, "input_length": 300, "output_length": 7}\n')
    target = tmp_path if flag == "--out" else trace
    with pytest.raises(ConfigError, match=rf"{flag} .*records\.jsonl is the file of --trace"):
        main([*FLAGS, "--policy", "esp", "--trace", str(trace), flag, str(target)])
    assert trace.read_text() == line


def test_help_names_the_flags(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_info:
        main(["--help"])
    assert exit_info.value.code == 0
    assert "--step-by-step" in capsys.readouterr().out


def span(kind: str, begin_s: float, end_s: float, *instances: int) -> Span:
    return Span(kind=kind, group=Group(instances), begin_s=begin_s, end_s=end_s, num_requests=1, num_steps=1)


def test_a_timeline_keeps_what_touches_its_window(tmp_path: pathlib.Path):
    timeline = Timeline(begin_s=1.0, length_s=1.0)
    inside = [span("prefill", 0.5, 1.5, 0, 1), span("decode", 1.5, 5.0, 0), span("migrate", 1.1, 1.2, 2)]
    for each in [span("decode", 0.0, 1.0, 0), *inside, span("decode", 2.0, 3.0, 1)]:
        timeline.note(each)
    assert timeline.spans == inside
    timeline.draw(tmp_path / "picture.png", title="three things")
    assert (tmp_path / "picture.png").read_bytes().startswith(PNG)


def test_an_empty_timeline_is_drawn_too(tmp_path: pathlib.Path):
    Timeline().draw(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").exists()
