"""Who is to blame for a failed iteration."""

from __future__ import annotations

from loongjax.core.cluster import Group
from loongjax.engine.failures import Failures
from loongjax.engine.live_request import LiveRequest
from tests.engine.cluster import Cluster

ZERO, ONE, BOTH = Group.of([0]), Group.of([1]), Group.of([0, 1])


def live(name: str) -> LiveRequest:
    return LiveRequest(Cluster().request(name, 8), 0, 0.0)


def test_a_first_failure_is_nobodys_fault() -> None:
    assert Failures().note_failure(BOTH, [live("a"), live("b")]) == []


def test_a_request_that_fails_twice_is_to_blame() -> None:
    failures, culprit, other = Failures(), live("a"), live("b")
    failures.note_failure(BOTH, [culprit, other])
    assert failures.note_failure(ZERO, [culprit]) == [culprit]


def test_a_request_that_got_a_token_in_between_is_not() -> None:
    failures, request = Failures(), live("a")
    failures.note_failure(ZERO, [request])
    failures.note_success(ZERO)
    request.num_failures = 0
    assert failures.note_failure(ZERO, [request]) == []


def test_two_failures_in_a_row_of_different_requests_are_the_devices_fault() -> None:
    failures = Failures()
    failures.note_failure(ZERO, [live("a")])
    assert failures.note_failure(ONE, [live("b")]) is None


def test_three_failures_in_a_row_are_the_devices_fault_whoever_took_part() -> None:
    failures, request = Failures(), live("a")
    assert failures.note_failure(ZERO, [request]) == []
    assert failures.note_failure(ZERO, [request]) == [request]
    assert failures.note_failure(ZERO, [request]) is None


def test_an_instance_that_fails_while_others_succeed_is_found() -> None:
    failures = Failures()
    failures.note_failure(BOTH, [live("a")])
    failures.note_success(ONE)
    assert failures.note_failure(ZERO, [live("b")]) is None


def test_failures_with_a_success_on_the_same_instances_in_between_are_not_in_a_row() -> None:
    failures = Failures()
    for _ in range(5):
        assert failures.note_failure(BOTH, [live("a")]) == []
        failures.note_success(BOTH)
