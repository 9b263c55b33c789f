"""Playing a workload: on a virtual clock for what is sent when, and beside the simulator, which must agree."""

import math
import signal
import sys

import pytest

from loongjax.config import SchedulingConfig
from loongjax.core.request import NO_SLO, Request, ServiceLevel
from loongjax.engine.client import ModelInfo
from loongjax.engine.core import EngineCore
from loongjax.engine.thread_switches import SWITCH_INTERVAL_S
from loongjax.errors import EngineDeadError
from loongjax.runtime.simulated import SimulatedRuntime
from loongjax.scheduler.build import build_policy
from loongjax_profiling.replay.player import Player, make_requests
from loongjax_profiling.replay.traced_runtime import TracedRuntime
from loongjax_profiling.simulate.cluster import ClusterSpec
from loongjax_profiling.simulate.simulation import simulate
from loongjax_profiling.simulate.workload.leval import LEvalLengths
from loongjax_profiling.simulate.workload.request import WorkloadRequest
from loongjax_profiling.simulate.workload.synthetic import synthesize
from tests.profiling.simulate.systems import RoundModel, arriving, cluster, system

MIXED = arriving((0.0, 50, 4), (0.01, 700, 9), (0.012, 20, 1), (0.5, 30, 12), (0.5, 200, 2), (3.0, 10, 3))


def requests_of(workload: list[WorkloadRequest], slo: ServiceLevel = NO_SLO) -> list[Request]:
    return make_requests(workload, vocab_size=2, slo=slo, seed=0)


class Stage:
    """A real step loop over a runtime on a virtual clock."""

    def __init__(self, spec: ClusterSpec, policy: str = "simple", **options) -> None:
        self.clock = SimulatedRuntime(spec.shape, spec.limits, RoundModel())
        self.runtime = TracedRuntime(self.clock)
        config = SchedulingConfig(policy=policy)  # pyright: ignore[reportArgumentType]
        self.core = EngineCore(
            self.runtime,
            build_policy(config, shape=spec.shape, max_num_seqs=spec.max_num_seqs, cost_model=RoundModel()),
            info=ModelInfo(
                checkpoint="none",
                max_model_len=spec.limits.max_model_len,
                vocab_size=2,
                eos_token_ids=(),
                default_sampling={},
            ),
            checks=True,
            **options,
        )
        self.player = Player(self.core, self.runtime, on_end=self.note_end)
        self.num_ended = 0
        self.on_end = lambda: None

    def note_end(self) -> None:
        self.num_ended += 1
        self.on_end()


@pytest.fixture
def stage() -> Stage:
    return Stage(cluster())


def test_the_same_seed_makes_the_same_requests_and_another_one_other_tokens():
    first, again = requests_of(MIXED), requests_of(MIXED)
    other = make_requests(MIXED, vocab_size=2, slo=NO_SLO, seed=1)
    assert first == again
    assert [request.prompt_token_ids for request in first] != [request.prompt_token_ids for request in other]


def test_requests_are_those_of_the_workload():
    workload = synthesize(LEvalLengths(), rate=2.0, num_requests=20, seed=3)
    requests = make_requests(workload, vocab_size=100, slo=ServiceLevel(ttft_s=2.0), seed=3)
    for index, (request, wanted) in enumerate(zip(requests, workload, strict=True)):
        assert request.request_id == f"request-{index}"
        assert (len(request.prompt_token_ids), request.max_tokens) == (wanted.prompt_len, wanted.output_len)
        assert request.arrival_s == wanted.arrival_s
        assert 0 <= min(request.prompt_token_ids) <= max(request.prompt_token_ids) < 100
        assert request.sampling.is_greedy
        assert not request.stop_token_ids
        assert request.slo.ttft_s == 2.0


def test_every_request_is_recorded_with_all_its_tokens(stage: Stage):
    playback = stage.player.play(requests_of(MIXED))
    assert [(r.request_id, r.prompt_len, r.output_len, r.issue_s) for r in playback.records] == [
        (f"request-{index}", wanted.prompt_len, wanted.output_len, wanted.arrival_s)
        for index, wanted in enumerate(MIXED)
    ]
    assert all(record.error is None and record.first_token_s is not None for record in playback.records)
    assert (playback.num_sent, stage.num_ended, playback.is_interrupted) == (6, 6, False)
    assert stage.core.is_idle


@pytest.mark.parametrize("policy", ["simple", "esp", "static", "replicated", "chunked", "disaggregated"])
@pytest.mark.parametrize("run_ahead", [False, True])
def test_an_engine_that_takes_as_long_as_predicted_is_measured_as_it_is_simulated(policy: str, run_ahead: bool):
    spec = cluster(num_instances=2, max_num_seqs=2)
    workload = [*MIXED, *arriving(*[(4.0 + 0.07 * index, 40 * (index % 5 + 1), index % 7 + 1) for index in range(30)])]
    measured = Stage(spec, policy, run_ahead=run_ahead).player.play(requests_of(workload)).records
    alike = system(spec, policy, cost_model=RoundModel(), step_by_step=True)
    object.__setattr__(alike, "run_ahead", run_ahead)
    assert list(measured) == simulate(alike, workload)


def test_a_request_that_comes_during_a_step_is_sent_when_it_is_due(stage: Stage):
    # The prefill of the first takes a quarter of a second, and the step loop waits for its end.
    playback = stage.player.play(requests_of(arriving((0.0, 1000, 1), (0.1, 10, 1))))
    assert playback.mean_intake_s == pytest.approx(0.0, abs=1e-9)


def test_threads_take_turns_as_often_as_in_an_engine_that_serves(stage: Stage):
    before_s = sys.getswitchinterval()
    intervals_s = []
    stage.on_end = lambda: intervals_s.append(sys.getswitchinterval())
    stage.player.play(requests_of(arriving((0.0, 10, 1))))
    assert intervals_s == [pytest.approx(SWITCH_INTERVAL_S)]
    assert sys.getswitchinterval() == before_s


def test_nothing_happens_before_the_first_request_is_due(stage: Stage):
    stage.clock.advance_to(100.0)
    playback = stage.player.play(requests_of(arriving((25.0, 8, 1))))
    (record,) = playback.records
    assert playback.begin_s == 100.0
    assert record.first_token_s == pytest.approx(25.008)


def test_wishes_are_recorded(stage: Stage):
    playback = stage.player.play(requests_of(arriving((0.0, 8, 1)), ServiceLevel(ttft_s=0.5, tpot_s=0.1)))
    assert (playback.records[0].ttft_slo_s, playback.records[0].tpot_slo_s) == (0.5, 0.1)


def test_a_request_that_is_refused_is_recorded_as_failed(stage: Stage):
    too_long = stage.core.info.max_model_len
    playback = stage.player.play(requests_of(arriving((0.0, 8, 2), (0.001, too_long, 9))))
    served, refused = playback.records
    assert served.error is None
    assert "maximum context length" in (refused.error or "")
    assert (refused.output_len, refused.first_token_s) == (0, None)


def test_one_that_meets_a_full_queue_is_recorded_as_failed():
    stage = Stage(cluster(num_instances=1), max_queue_len=1)
    playback = stage.player.play(requests_of(arriving((0.0, 500, 2), (0.1, 8, 2), (0.1, 9, 2))))
    assert [record.error is None for record in playback.records] == [True, True, False]
    assert "1 requests wait" in (playback.records[2].error or "")


def test_when_time_is_over_what_has_ended_is_kept_and_the_engine_is_left_empty(stage: Stage):
    playback = stage.player.play(
        requests_of(arriving((0.0, 40, 3), (0.3, 40, 1000), (0.6, 40, 2), (5.0, 40, 2))), limit_s=1.0
    )
    assert [record.request_id for record in playback.records] == ["request-0", "request-2"]
    assert (playback.num_sent, playback.is_interrupted) == (3, False)
    assert stage.core.is_idle
    stage.core.check_integrity()


def test_ctrl_c_keeps_what_has_ended_and_leaves_the_engine_empty(stage: Stage):
    stage.on_end = lambda: signal.raise_signal(signal.SIGINT) if stage.num_ended == 2 else None
    playback = stage.player.play(requests_of(MIXED))
    assert playback.is_interrupted
    assert len(playback.records) == 2
    assert stage.core.is_idle
    stage.core.check_integrity()


def test_an_engine_that_dies_leaves_the_records_of_who_had_ended(stage: Stage):
    def die() -> None:
        stage.core.death = "struck by lightning"

    stage.on_end = die
    with pytest.raises(EngineDeadError, match="lightning"):
        stage.player.play(requests_of(MIXED))
    assert [record.error for record in stage.player.records] == [None] * stage.num_ended
    assert stage.num_ended > 0


def test_a_workload_of_nothing_is_over_at_once(stage: Stage):
    playback = stage.player.play([])
    assert (playback.records, playback.num_sent) == ((), 0)
    assert math.isclose(playback.begin_s, stage.runtime.now_s())
