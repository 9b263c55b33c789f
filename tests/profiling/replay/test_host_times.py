"""What the host adds: measured from iterations, and put into a simulation. Times are worked out by hand."""

import dataclasses
import json
import pathlib

import pytest

from loongjax.engine.client import EngineStats
from loongjax.errors import ConfigError
from loongjax.runtime.simulated import NO_HOST, HostTimes, Span
from loongjax_profiling.replay.host_times import measure_host_times
from loongjax_profiling.replay.player import Playback
from loongjax_profiling.simulate.assembly import assemble_system
from loongjax_profiling.simulate.config import SimulateConfig
from loongjax_profiling.simulate.host_times import read_host_times
from loongjax_profiling.simulate.simulation import SimulatedSystem, simulate
from tests.profiling.replay.iterations import traced_decode, traced_prefill, traced_recovery
from tests.profiling.simulate.systems import RoundModel, arriving, cluster, system

HOST = HostTimes(intake_s=0.002, turnaround_s=0.003, decode_begin_s=0.02, prefill_begin_s=0.004, telling_s=0.001)


def played(**times: float) -> Playback:
    nothing = {"mean_intake_s": 0.0, "mean_telling_s": 0.0}
    return Playback(records=(), num_sent=0, begin_s=0.0, is_interrupted=False, stats=EngineStats(), **(nothing | times))


def test_a_turnaround_is_the_median_over_what_did_not_go_on():
    iterations = [
        traced_prefill(100, 0.1, turnaround_s=0.5),
        traced_prefill(100, 0.1, turnaround_s=0.002),
        traced_decode(0.01, continues=False, turnaround_s=0.003),
        traced_decode(0.01, continues=True, turnaround_s=9.0),
        traced_prefill(100, 0.1),
    ]
    assert measure_host_times(played(), iterations, RoundModel(), 1).turnaround_s == pytest.approx(0.003)


def test_a_decodes_begin_is_what_first_steps_take_beyond_the_prediction():
    # Each is predicted to take 10 ms.
    iterations = [
        traced_decode(0.3, continues=False),
        traced_decode(0.013, continues=False),
        traced_decode(0.015, continues=False),
        traced_decode(0.5, continues=True),
        dataclasses.replace(traced_decode(0.6, continues=False), submitted_s=0.9),
        traced_prefill(100, 5.0),
        traced_recovery(1.0),
    ]
    assert measure_host_times(played(), iterations, RoundModel(), 1).decode_begin_s == pytest.approx(0.005)


def test_a_prefills_begin_is_what_it_takes_beyond_the_prediction_where_nothing_is_before_it():
    # A millisecond a token is predicted.
    behind = dataclasses.replace(traced_prefill(100, 0.9), submitted_s=0.9)
    iterations = [traced_prefill(100, 0.103), traced_prefill(200, 0.207), traced_prefill(10, 0.6), behind, behind]
    host = measure_host_times(played(), iterations, RoundModel(), 1)
    assert host.prefill_begin_s == pytest.approx(0.007)
    assert host.decode_begin_s == 0.0


def test_a_host_of_before_prefills_had_a_begin_is_read(tmp_path: pathlib.Path):
    host = {name: value for name, value in dataclasses.asdict(HOST).items() if name != "prefill_begin_s"}
    path = write_host(tmp_path / "comparison.json", {"host": host})
    assert read_host_times(path) == dataclasses.replace(HOST, prefill_begin_s=0.0)


def test_first_steps_that_are_quicker_than_predicted_take_nothing_away():
    iterations = [traced_decode(0.004, continues=False)]
    assert measure_host_times(played(), iterations, RoundModel(), 1).decode_begin_s == 0.0


def test_nothing_measured_is_nothing_added():
    assert measure_host_times(played(), [], RoundModel(), 1) == NO_HOST


def test_how_long_requests_and_clients_waited_is_taken_from_the_playback():
    host = measure_host_times(played(mean_intake_s=0.25, mean_telling_s=0.5), [], RoundModel(), 1)
    assert host == HostTimes(intake_s=0.25, telling_s=0.5)


def one_instance(host: HostTimes, **options: bool) -> SimulatedSystem:
    """Prefills take a millisecond a token, decode steps 10 ms."""
    alone = system(cluster(num_instances=1), "replicated", cost_model=RoundModel())
    return dataclasses.replace(alone, host=host, **options)


@pytest.mark.parametrize("options", [{}, {"step_by_step": True}])
def test_a_lone_request_waits_for_the_host_where_nothing_is_submitted_ahead(options: dict[str, bool]):
    (record,) = simulate(one_instance(HOST, **options), arriving((1.0, 100, 5)))
    assert record.issue_s == 1.0
    # Arrival, intake, turnaround, prefill with its beginning, and until the client is told.
    assert record.first_token_s == pytest.approx(1.0 + 0.002 + 0.003 + 0.004 + 0.1 + 0.001)
    # The first step begins a turnaround after the prefill and takes longer; the other three follow at once.
    assert record.complete_s == pytest.approx(1.109 + 0.003 + 0.02 + 4 * 0.01 + 0.001)


@pytest.mark.parametrize(("prompt_len", "left_s"), [(100, 0.0), (16, 0.0), (11, 0.005)])
def test_the_host_makes_a_decode_ready_while_the_prefill_before_it_runs(prompt_len: int, left_s: float):
    """Both are submitted together, a turnaround after the step loop has the request. Of the decode's beginning only
    what the prefill does not cover is waited for."""
    (record,) = simulate(one_instance(HOST, run_ahead=True), arriving((1.0, prompt_len, 5)))
    first_s = 1.0 + 0.002 + 0.003 + 0.004 + 1e-3 * prompt_len
    assert record.first_token_s == pytest.approx(first_s + 0.001)
    assert record.complete_s == pytest.approx(first_s + left_s + 4 * 0.01 + 0.001)


@pytest.mark.parametrize("options", [{}, {"step_by_step": True}, {"run_ahead": True}])
def test_a_host_that_adds_nothing_changes_nothing_for_a_lone_request(options: dict[str, bool]):
    workload = arriving((1.0, 100, 5))
    assert simulate(one_instance(NO_HOST, **options), workload) == simulate(one_instance(NO_HOST), workload)


@pytest.mark.parametrize("host", [NO_HOST, HOST])
def test_jumps_change_nothing_with_any_host(host: HostTimes):
    workload = arriving((0.0, 50, 40), (0.0, 70, 25), (0.2, 300, 30), (0.6, 20, 3), (2.0, 10, 50))
    step_by_step = simulate(one_instance(host, step_by_step=True), workload)
    assert simulate(one_instance(host), workload) == step_by_step


def test_who_comes_while_a_decode_runs_ahead_waits_for_one_step_more():
    # The first request decodes from 0.1 s on, a step each 10 ms; the second comes 4 ms into a step.
    workload = arriving((0.0, 100, 50), (0.204, 30, 1))
    waits = simulate(one_instance(NO_HOST, step_by_step=True), workload)[1]
    waits_longer = simulate(one_instance(NO_HOST, run_ahead=True), workload)[1]
    assert waits.first_token_s == pytest.approx(0.21 + 0.03)
    assert waits_longer.first_token_s == pytest.approx(0.22 + 0.03)


def test_spans_show_iterations_without_the_wait_before_them():
    spans: list[Span] = []
    simulate(one_instance(HOST), arriving((1.0, 100, 5)), on_span=spans.append)
    assert [span.kind for span in spans] == ["prefill", "decode"]
    prefill, decode = spans
    assert prefill.end_s - prefill.begin_s == pytest.approx(0.004 + 0.1)
    assert decode.begin_s - prefill.end_s == pytest.approx(0.003)


def write_host(path: pathlib.Path, content: object) -> pathlib.Path:
    path.write_text(json.dumps(content))
    return path


def test_a_simulation_reads_host_times_from_a_replays_file(tmp_path: pathlib.Path):
    path = write_host(tmp_path / "comparison.json", {"latencies": [], "host": dataclasses.asdict(HOST)})
    assert read_host_times(path) == HOST
    assert assemble_system(SimulateConfig(cost_model="a800", host=path, run_ahead=True)).host == HOST


@pytest.mark.parametrize(
    "content",
    [
        {},
        [],
        {"host": {}},
        {"host": {"turnaround_s": 0.1}},
        {"host": dataclasses.asdict(HOST) | {"more": 1.0}},
        {"host": dataclasses.asdict(HOST) | {"intake_s": -0.1}},
        {"host": dataclasses.asdict(HOST) | {"intake_s": "0.1"}},
        {"host": dataclasses.asdict(HOST) | {"intake_s": True}},
        {"host": dataclasses.asdict(HOST) | {"telling_s": float("nan")}},
    ],
)
def test_a_file_of_anything_else_is_refused(tmp_path: pathlib.Path, content: object):
    with pytest.raises(ConfigError, match=r"--host .*comparison\.json"):
        read_host_times(write_host(tmp_path / "comparison.json", content))


def test_a_file_that_is_not_there_is_refused(tmp_path: pathlib.Path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_host_times(tmp_path / "comparison.json")
