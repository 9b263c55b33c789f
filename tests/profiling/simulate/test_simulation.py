"""A workload on a system: what comes out is what went in, later."""

import itertools
import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings

from loongjax.core.request import ServiceLevel
from loongjax.errors import ConfigError
from loongjax.runtime.simulated import Span
from loongjax_profiling.records import RequestRecord
from loongjax_profiling.simulate.cluster import PRESETS, ClusterSpec
from loongjax_profiling.simulate.pod import Job
from loongjax_profiling.simulate.simulation import simulate
from loongjax_profiling.simulate.workload.request import WorkloadRequest
from tests.profiling.simulate.systems import RoundModel, arriving, cluster, system, workloads


def test_a_lone_request_takes_its_prefill_and_its_steps():
    (record,) = simulate(system(cost_model=RoundModel()), arriving((2.0, 500, 11)))
    assert (record.prompt_len, record.output_len, record.issue_s) == (500, 11, 2.0)
    assert record.first_token_s == pytest.approx(2.5)
    assert record.complete_s == pytest.approx(2.6)


def test_a_single_token_is_complete_when_it_is_there():
    (record,) = simulate(system(cost_model=RoundModel()), arriving((0.0, 500, 1)))
    assert record.first_token_s == record.complete_s == pytest.approx(0.5)


def test_on_one_instance_the_second_request_waits_for_the_first():
    alone = system(cluster(1, max_num_batched_tokens=600), "prefill-first", cost_model=RoundModel())
    first, second = simulate(alone, arriving((0.0, 500, 2), (0.0, 500, 2)))
    assert first.first_token_s == pytest.approx(0.5)
    assert second.first_token_s is not None
    assert second.first_token_s >= 1.0


@pytest.mark.parametrize("policy", ["simple", "esp", "static", "replicated", "disaggregated"])
@given(workload=workloads(max_total_len=60))
@settings(max_examples=3, deadline=None)
def test_every_request_gets_its_tokens_in_order_of_time(policy: str, workload: list[WorkloadRequest]):
    spec = cluster(4, num_slots=64, page_size=4, max_num_batched_tokens=64, max_num_seqs=4)
    records = simulate(system(spec, policy), workload)
    assert [(r.issue_s, r.prompt_len, r.output_len) for r in records] == [
        (r.arrival_s, r.prompt_len, r.output_len) for r in workload
    ]
    for record in records:
        assert record.first_token_s is not None
        assert record.issue_s < record.first_token_s <= record.complete_s < math.inf


def test_an_instance_does_one_thing_at_a_time():
    spans: list[Span] = []
    workload = arriving(*[(0.05 * index, 50 + 37 * index, 40) for index in range(20)])
    simulate(system(), workload, on_span=spans.append)
    for instance in range(4):
        mine = sorted((s.begin_s, s.end_s) for s in spans if instance in s.group)
        assert all(end_s <= begin_s for (_, end_s), (begin_s, _) in itertools.pairwise(mine))


def test_the_same_workload_gives_the_same_records():
    workload = arriving(*[(0.1 * index, 100 + 31 * index, 60) for index in range(15)])
    assert simulate(system(), workload) == simulate(system(), workload)


def latencies(record: RequestRecord) -> tuple[float, float, float]:
    assert record.ttft_s is not None
    assert record.tpot_s is not None
    return record.ttft_s, record.tpot_s, record.latency_s


@pytest.mark.parametrize("policy", ["esp", "replicated"])
@given(workload=workloads(max_total_len=60))
@settings(max_examples=5, deadline=None)
def test_to_be_asked_whether_it_is_hopeless_changes_nothing(policy: str, workload: list[WorkloadRequest]):
    spec = cluster(4, num_slots=64, page_size=4, max_num_batched_tokens=64, max_num_seqs=4)
    undisturbed = simulate(system(spec, policy), workload)
    seen: list[Sequence[RequestRecord]] = []

    def look(records: Sequence[RequestRecord]) -> bool:
        seen.append(records)
        return False

    assert simulate(system(spec, policy), workload, is_hopeless=look) == undisturbed
    for records in seen:
        for best, real in zip(records, undisturbed, strict=True):
            assert (best.request_id, best.issue_s, best.output_len) == (real.request_id, real.issue_s, real.output_len)
            for at_best, in_the_end in zip(latencies(best), latencies(real), strict=True):
                assert at_best <= in_the_end + 1e-9


def test_a_hopeless_simulation_stops_and_says_what_it_would_have_come_to_at_best():
    alone = system(cluster(1, max_num_batched_tokens=600), "prefill-first", cost_model=RoundModel())
    workload = arriving(*[(0.1 * index, 500, 1) for index in range(50)])
    spans: list[Span] = []

    def is_late(records: Sequence[RequestRecord]) -> bool:
        return sum(record.latency_s for record in records) > 20.0

    records = simulate(alone, workload, on_span=spans.append, is_hopeless=is_late)
    assert is_late(records)
    assert [record.issue_s for record in records] == [request.arrival_s for request in workload]
    assert spans[-1].end_s < 5.0
    assert records[-1].latency_s == 0.0


@pytest.mark.parametrize("gap_s", [0.0, 1e-9])
def test_requests_that_come_all_at_once_are_looked_at_about_once_a_second(gap_s: float):
    alone = system(cluster(1, max_num_batched_tokens=600), "prefill-first", cost_model=RoundModel())
    workload = arriving(*[(gap_s * index, 500, 1) for index in range(20)])
    seen: list[Sequence[RequestRecord]] = []
    simulate(alone, workload, is_hopeless=lambda records: bool(seen.append(records)))
    assert 9 <= len(seen) <= 11  # they take ten seconds


def test_who_waits_for_pods_to_merge_is_seen_to_wait():
    parts = system(
        cluster(4, num_slots=512, max_num_batched_tokens=1024), "simple", cost_model=RoundModel(), pod_size=2
    )
    workload = arriving((0.0, 500, 400), (0.1, 500, 400), (0.2, 1500, 2), (0.3, 1500, 2))
    seen: list[Sequence[RequestRecord]] = []
    simulate(parts, workload, is_hopeless=lambda records: bool(seen.append(records)))
    waits = [records[2].latency_s for records in seen]
    assert waits == sorted(waits)
    assert waits[-1] > 1.0


def test_a_request_that_the_policy_cannot_carry_to_its_end_is_refused():
    spec = cluster(4, num_slots=512, max_num_batched_tokens=512)
    workload = arriving((0.0, 900, 10), (0.1, 400, 10))
    assert [record.error is None for record in simulate(system(spec, "replicated"), workload)] == [False, True]
    assert [record.error is None for record in simulate(system(spec, "simple"), workload)] == [True, True]


def test_where_prompts_are_cut_only_the_pool_limits_them():
    spec = cluster(2, num_slots=1024, max_num_batched_tokens=100)
    workload = arriving((0.0, 1000, 20), (0.1, 1000, 30))
    cutting = system(spec, "chunked", cost_model=RoundModel())
    served, refused = simulate(cutting, workload)
    assert served.error is None
    assert served.first_token_s == pytest.approx(1.0)
    assert refused.error is not None


def test_wishes_reach_the_records():
    wish = ServiceLevel(ttft_s=0.1, tpot_s=1.0)
    (record,) = simulate(system(cost_model=RoundModel()), arriving((0.0, 500, 3)), slo=lambda request: wish)
    assert (record.ttft_slo_s, record.tpot_slo_s, record.meets_slo) == (0.1, 1.0, False)


def test_a_pod_whose_time_was_not_reached_knows_nothing_of_the_future():
    pod = system(cost_model=RoundModel()).build_pod((0, 1), on_span=lambda span: None)
    request = WorkloadRequest(arrival_s=0.0, prompt_len=500, output_len=101)
    pod.add(Job(request_id="a", request=request, slo=ServiceLevel()), 0.0)
    assert pod.run_until(1.0) == []
    assert pod.num_live == 1
    (record,) = pod.run_until(1.6)
    assert record.complete_s == pytest.approx(1.5)
    assert pod.num_live == 0


@pytest.mark.parametrize("spec", [preset.spec for preset in PRESETS.values()], ids=PRESETS)
def test_presets_hold_a_request_of_half_a_million_tokens(spec: ClusterSpec):
    pod = system(spec).build_pod(spec.shape.all_instances)
    assert pod.can_hold(WorkloadRequest(arrival_s=0.0, prompt_len=499_000, output_len=1000))


def test_a_cluster_of_more_pages_than_can_be_kept_is_refused():
    for num_instances, num_slots, page_size in ((1, 10**12, 1000), (1 << 14, 1 << 18, 8), (1 << 29, 1, 1)):
        with pytest.raises(ConfigError, match=r"at most 268435456 pages, got .* lower num_slots, or raise page_size"):
            ClusterSpec(num_instances=num_instances, tp=1, num_slots=num_slots, page_size=page_size)
    ClusterSpec(num_instances=1024, tp=1, num_slots=1 << 20, page_size=4)


@pytest.mark.parametrize("fields", [{"num_slots": 17}, {"num_slots": 0}, {"num_instances": 0}, {"max_model_len": 0}])
def test_impossible_clusters_are_refused(fields: dict[str, int]):
    with pytest.raises(ConfigError):
        ClusterSpec(**({"num_instances": 1, "tp": 1, "num_slots": 16} | fields))  # pyright: ignore[reportArgumentType]
