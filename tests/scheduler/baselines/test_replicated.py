from loongjax.core.cluster import Group
from loongjax.core.plan import Decode, Prefill
from tests.scheduler.baselines.questions import ask, groups, policy_for
from tests.scheduler.views import cluster, running, waiting


def test_replicas_work_side_by_side_on_requests_of_their_own():
    plans = ask("replicated", cluster(waits=[waiting(f"w{i}", i, 10) for i in range(4)]))
    assert groups(plans) == [Group((i,)) for i in range(4)]
    assert all(isinstance(plan, Prefill) and len(plan.requests) == 1 for plan in plans)


def test_a_request_goes_to_the_replica_with_the_fewest_tokens():
    runs = [running("a", 0, (0, 100)), running("b", 1, (1, 10)), running("c", 2, (2, 50))]
    plans = ask("replicated", cluster(3, num_pages=1000, runs=runs, waits=[waiting("w", 3, 10)]))
    assert [type(plan) for plan in plans] == [Decode, Prefill, Decode]


def test_a_long_prompt_leaves_the_short_ones_to_other_replicas():
    waits = [waiting("long", 0, 300), *(waiting(f"w{i}", 1 + i, 10) for i in range(6))]
    plans = ask("replicated", cluster(2, num_pages=1000, waits=waits))
    batches = [[request.request_id for request in plan.requests] for plan in plans if isinstance(plan, Prefill)]
    assert batches == [["long"], [f"w{i}" for i in range(6)]]


def test_a_request_stays_with_its_replica_while_it_waits():
    busy = cluster(2, num_pages=1000, waits=[waiting("w", 2, 10)], decoding=[0], runs=[running("b", 1, (1, 20))])
    policy = policy_for("replicated", busy)
    assert [type(plan) for plan in ask("replicated", busy, policy)] == [Decode]
    # By now the other one has fewer tokens.
    fuller = cluster(2, num_pages=1000, waits=[waiting("w", 2, 10)], runs=[running("a", 0, (0, 50))])
    (plan,) = ask("replicated", fuller, policy)
    assert isinstance(plan, Prefill)
    assert plan.group == Group((0,))
