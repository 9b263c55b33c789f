"""Large clusters: pods, who gets what, and what no pod can hold."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loongjax.engine.client import EngineStats
from loongjax.errors import ConfigError
from loongjax.runtime.simulated import Span
from loongjax_profiling.elasticity import Elasticity
from loongjax_profiling.simulate.a800 import a800_model
from loongjax_profiling.simulate.load import LoadPredictor
from loongjax_profiling.simulate.simulation import SimulatedSystem, simulate
from loongjax_profiling.simulate.workload.request import WorkloadRequest
from tests.profiling.simulate.systems import RoundModel, arriving, cluster, system, workloads


def pods_of_two(num_pods: int, num_tokens: int = 2000) -> SimulatedSystem:
    """Each pod holds requests of so many tokens."""
    spec = cluster(2 * num_pods, num_slots=num_tokens // 2 + 8, page_size=8, max_num_batched_tokens=num_tokens // 2)
    return system(spec, cost_model=RoundModel(), pod_size=2)


@pytest.mark.parametrize(
    ("num_instances", "pod_size", "sizes"),
    [(16, 16, [16]), (17, 16, [8, 9]), (64, 16, [16] * 4), (3, 2, [1, 2]), (1, 16, [1])],
)
def test_pods_are_few_and_even_and_cover_the_cluster(num_instances: int, pod_size: int, sizes: list[int]):
    parts = system(cluster(num_instances), pod_size=pod_size).parts()
    assert [len(part) for part in parts] == sizes
    assert [instance for part in parts for instance in part] == list(range(num_instances))


def test_a_pod_without_instances_is_refused():
    with pytest.raises(ConfigError, match="pod"):
        system(pod_size=0)


def test_requests_go_where_there_is_least_to_do():
    spans: list[Span] = []
    workload = arriving((0.0, 2000 - 5, 5), (0.0, 100, 5), (0.0, 100, 5))
    simulate(pods_of_two(2), workload, on_span=spans.append)
    busy = [span for span in spans if span.kind == "prefill"]
    assert {span.group.instances[0] // 2 for span in busy if span.num_requests == 1 and span.end_s > 0.9} == {0}
    assert sum(span.num_requests for span in busy if span.group.instances[0] >= 2) == 2


def test_pods_share_a_load_evenly():
    spans: list[Span] = []
    workload = arriving(*[(0.01 * index, 100, 20) for index in range(40)])
    simulate(pods_of_two(4), workload, on_span=spans.append)
    prefilled = [0] * 4
    for span in spans:
        prefilled[span.group.instances[0] // 2] += span.num_requests * (span.kind == "prefill")
    assert max(prefilled) - min(prefilled) <= 4


def test_decode_steps_are_counted_in_all_pods_those_that_were_merged_for_a_while_included():
    spans: list[Span] = []
    stats: list[EngineStats] = []
    workload = arriving((0.0, 400, 20), (0.1, 2500, 10), (5.0, 100, 5))
    simulate(pods_of_two(3), workload, on_span=spans.append, on_end=stats.extend)
    expected: dict[int, int] = {}
    for span in spans:
        if span.kind == "decode":
            expected[span.group.dop] = expected.get(span.group.dop, 0) + span.num_steps
    assert Elasticity.of(stats).decode_steps_by_dop == expected
    assert sum(expected.values()) == 19 + 9 + 4


def test_what_no_pod_can_hold_gets_several_pods_and_then_they_part():
    spans: list[Span] = []
    workload = arriving((0.0, 400, 20), (0.1, 2500, 10), (5.0, 100, 5))
    first, large, last = simulate(pods_of_two(3), workload, on_span=spans.append)
    (merged,) = [span for span in spans if span.kind == "prefill" and span.group.dop > 2]
    assert merged.group.dop > 2
    assert large.output_len == 10
    assert first.complete_s < 1.0
    assert last.ttft_s == pytest.approx(0.1)


def test_a_model_has_to_know_the_groups_of_pods_that_merge():
    spec = cluster(6, num_slots=1008, page_size=8, max_num_batched_tokens=1000)
    pods = system(spec, cost_model=a800_model(3), pod_size=2)
    simulate(pods, arriving((0.0, 1900, 5), (0.0, 7000, 5)))  # a pod, and refused
    with pytest.raises(ConfigError, match=r"4 instances of tp=2 .* knows nothing of sp4 tp2"):
        simulate(pods, arriving((0.0, 2500, 10)))
    with pytest.raises(ConfigError, match=r"6 instances of tp=2 .* knows nothing of sp4 tp2, sp5 tp2, sp6 tp2"):
        simulate(pods, arriving((0.0, 5500, 10)))


def test_pods_that_merge_first_finish_what_they_have():
    spans: list[Span] = []
    workload = arriving((0.0, 400, 200), (0.0, 400, 200), (0.1, 2500, 10), (0.2, 100, 5))
    *_, large, small = simulate(pods_of_two(2), workload, on_span=spans.append)
    (merged,) = [span for span in spans if span.kind == "prefill" and span.group.dop > 2]
    assert merged.begin_s == pytest.approx(max(span.end_s for span in spans if span.end_s <= merged.begin_s))
    assert merged.begin_s > 2.0
    # Whoever comes while every pod is closed waits until they part.
    assert small.first_token_s is not None
    assert small.first_token_s > large.complete_s


def test_what_the_whole_cluster_cannot_hold_is_refused_at_once():
    (record,) = simulate(pods_of_two(2), arriving((1.0, 4000, 100)))
    assert record.error is not None
    assert "4000" in record.error
    assert record.first_token_s is None
    assert record.complete_s == 1.0


@given(workload=workloads(max_total_len=290), num_pods=st.integers(1, 4))
@settings(max_examples=10, deadline=None)
def test_nobody_is_lost_whatever_comes(workload: list[WorkloadRequest], num_pods: int):
    records = simulate(pods_of_two(num_pods, num_tokens=96), workload)
    for record, request in zip(records, workload, strict=True):
        fits = request.prompt_len + request.output_len <= 96 * num_pods
        assert (record.error is None) is fits
        assert record.output_len == (request.output_len if fits else 0)
        assert record.issue_s == request.arrival_s <= record.complete_s


def test_predicted_work_grows_with_the_prompt_and_with_the_outputs_seen():
    predictor = LoadPredictor(RoundModel(), 2)
    short, long = predictor.seconds(100), predictor.seconds(1000)
    assert long - short == pytest.approx(0.9)
    for _ in range(500):
        predictor.observe(1000)
    assert predictor.seconds(100) == pytest.approx(0.1 + 1000 * 0.01 / 16, rel=0.01)
