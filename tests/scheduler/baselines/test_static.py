from loongjax.core.cluster import Group
from loongjax.core.plan import Decode, Prefill
from tests.scheduler.baselines.questions import ask, groups, policy_for, tell
from tests.scheduler.views import cluster, running, waiting


def test_static_prefills_and_decodes_on_all_instances():
    everything = Group((0, 1, 2, 3))
    assert groups(ask("static", cluster(waits=[waiting("a", 0, 4)]))) == [everything]
    assert groups(ask("static", cluster(runs=[running("a", 0, (2, 9))]))) == [everything]


def test_static_spreads_the_keys_of_a_prompt_evenly():
    (plan,) = ask("static", cluster(waits=[waiting("a", 0, 160)]))
    assert isinstance(plan, Prefill)
    assert sorted((kept.instance, kept.num_tokens) for kept in plan.requests[0].kept) == [(i, 40) for i in range(4)]


def test_static_waits_for_the_whole_group():
    assert ask("static", cluster(waits=[waiting("a", 0, 4)], decoding=[2])) == ()


def test_static_lets_requests_in_every_tenth_step():
    view = cluster(waits=[waiting("b", 1, 4)], runs=[running("a", 0, (0, 9))])
    policy = policy_for("static", view)
    (first,) = ask("static", view, policy)
    assert isinstance(first, Prefill)
    tell(policy, first)
    for _ in range(10):
        (plan,) = ask("static", view, policy)
        assert isinstance(plan, Decode)
        tell(policy, plan)
    assert isinstance(ask("static", view, policy)[0], Prefill)


def test_static_does_not_wait_for_steps_if_nobody_runs():
    view = cluster(waits=[waiting("b", 1, 4)])
    policy = policy_for("static", view)
    tell(policy, Prefill(Group((0, 1, 2, 3)), ()))
    assert isinstance(ask("static", view, policy)[0], Prefill)


def test_static_lets_in_only_whom_it_will_not_have_to_preempt():
    runs = [running("a", 0, (0, 40))]  # and 1000 tokens to come, of 1600 slots
    fits = waiting("b", 1, 40, max_total_tokens=500)
    does_not = waiting("b", 1, 40, max_total_tokens=900)
    assert isinstance(ask("static", cluster(runs=runs, waits=[fits]))[0], Prefill)
    assert isinstance(ask("static", cluster(runs=runs, waits=[does_not]))[0], Decode)


def test_steps_of_other_groups_are_not_counted():
    view = cluster(waits=[waiting("b", 1, 4)], runs=[running("a", 0, (0, 9))])
    policy = policy_for("static", view)
    tell(policy, Prefill(Group((0, 1)), ()))
    assert isinstance(ask("static", view, policy)[0], Prefill)


def test_a_copy_counts_for_itself():
    view = cluster(waits=[waiting("b", 1, 4)], runs=[running("a", 0, (0, 9))])
    policy = policy_for("static", view)
    tell(policy.copy(), Prefill(Group((0, 1, 2, 3)), ()))
    assert isinstance(ask("static", view, policy)[0], Prefill)
