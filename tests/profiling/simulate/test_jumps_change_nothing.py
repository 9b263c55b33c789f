"""Decodes of many steps give the records that single steps give, to the last bit."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loongjax.runtime.simulated import Span
from loongjax_profiling.simulate.simulation import simulate
from loongjax_profiling.simulate.workload.leval import LEvalLengths
from loongjax_profiling.simulate.workload.request import WorkloadRequest
from loongjax_profiling.simulate.workload.sharegpt import ShareGptLengths
from loongjax_profiling.simulate.workload.synthetic import synthesize
from tests.profiling.simulate.systems import arriving, cluster, system, workloads

ELASTIC = ("simple", "esp")
RIGID = ("static", "replicated", "chunked", "disaggregated")
CROWDED = cluster(4, num_slots=64, page_size=4, max_num_batched_tokens=64, max_num_seqs=4)
"""Memory for four requests of the longest kind, if for that."""
ROOMY = cluster(4, num_slots=4096, page_size=16, max_num_batched_tokens=1024, max_num_seqs=8)


def records_of(workload: list[WorkloadRequest], spec, policy: str, *, step_by_step: bool):
    return simulate(system(spec, policy, step_by_step=step_by_step), workload)


@pytest.mark.parametrize("policy", [*ELASTIC, *RIGID])
@given(workload=workloads(max_total_len=60))
@settings(max_examples=3, deadline=None)
def test_where_memory_is_short(policy: str, workload: list[WorkloadRequest]):
    expected = records_of(workload, CROWDED, policy, step_by_step=True)
    assert records_of(workload, CROWDED, policy, step_by_step=False) == expected


@pytest.mark.parametrize("policy", [*ELASTIC, *RIGID])
@given(workload=workloads(max_total_len=120, max_requests=6))
@settings(max_examples=2, deadline=None)
def test_where_there_is_room(policy: str, workload: list[WorkloadRequest]):
    expected = records_of(workload, ROOMY, policy, step_by_step=True)
    assert records_of(workload, ROOMY, policy, step_by_step=False) == expected


@given(workload=workloads(max_total_len=60))
@settings(max_examples=3, deadline=None)
def test_where_prompts_are_longer_than_a_prefill(workload: list[WorkloadRequest]):
    spec = dataclasses.replace(CROWDED, max_num_batched_tokens=8)
    expected = records_of(workload, spec, "chunked", step_by_step=True)
    assert all(record.error is None for record in expected)
    assert records_of(workload, spec, "chunked", step_by_step=False) == expected


def test_where_a_decode_computes_the_last_token_of_a_prompt():
    spec = dataclasses.replace(CROWDED, max_num_batched_tokens=8)
    workload = [WorkloadRequest(arrival_s=0.0, prompt_len=17, output_len=20)]
    [expected] = records_of(workload, spec, "chunked", step_by_step=True)
    assert records_of(workload, spec, "chunked", step_by_step=False) == [expected]
    assert expected.first_token_s is not None
    assert expected.first_token_s < expected.complete_s / 2


@given(workload=workloads(max_total_len=120, max_requests=6), size=st.integers(1, 6))
@settings(max_examples=3, deadline=None)
def test_on_one_instance_as_in_vllm(workload: list[WorkloadRequest], size: int):
    spec = cluster(1, num_slots=size * 128, max_num_batched_tokens=size * 128)
    workload = [request for request in workload if request.prompt_len + request.output_len <= size * 128]
    expected = records_of(workload, spec, "prefill-first", step_by_step=True)
    assert records_of(workload, spec, "prefill-first", step_by_step=False) == expected


@pytest.mark.parametrize("policy", ELASTIC)
def test_on_workloads_like_real_ones(policy: str):
    spec = cluster(4, num_slots=210_000, page_size=16, max_num_batched_tokens=210_000, max_num_seqs=256)
    for lengths, rate in ((ShareGptLengths(), 4.0), (LEvalLengths(), 1.0)):
        workload = synthesize(lengths, rate=rate, num_requests=3)
        expected = records_of(workload, spec, policy, step_by_step=True)
        assert records_of(workload, spec, policy, step_by_step=False) == expected


def test_a_request_alone_decodes_in_one_jump():
    spans: list[Span] = []
    (record,) = simulate(system(), arriving((1.0, 100, 1000)), on_span=spans.append)
    assert [(span.kind, span.num_steps) for span in spans] == [("prefill", 1), ("decode", 999)]
    assert record.output_len == 1000
    assert spans[-1].end_s == record.complete_s


def test_single_steps_are_single_steps():
    spans: list[Span] = []
    simulate(system(step_by_step=True), arriving((1.0, 100, 50)), on_span=spans.append)
    assert [span.num_steps for span in spans] == [1] * 50
