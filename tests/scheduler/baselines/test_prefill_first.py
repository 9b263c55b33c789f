import pytest

from loongjax.core.plan import Decode, Preempt, Prefill
from loongjax.errors import ConfigError
from tests.scheduler.baselines.questions import ask, policy_for, tell
from tests.scheduler.views import cluster, running, waiting


def test_prefill_first_prefills_while_there_is_memory():
    view = cluster(1, waits=[waiting("b", 1, 4)], runs=[running("a", 0, (0, 9))])
    policy = policy_for("prefill-first", view)
    for _ in range(20):
        (plan,) = ask("prefill-first", view, policy)
        assert isinstance(plan, Prefill)
        tell(policy, plan)
    full = cluster(1, waits=[waiting("b", 1, 4)], runs=[running("a", 0, (0, 4 * 99))])
    assert [type(plan) for plan in ask("prefill-first", full, policy)] == [Decode]


def test_prefill_first_does_not_starve_those_that_run():
    view = cluster(1, waits=[waiting("b", 1, 4)], runs=[running("a", 0, (0, 9))])
    policy = policy_for("prefill-first", view)
    (plan,) = ask("prefill-first", view, policy)
    assert isinstance(plan, Prefill)
    tell(policy, plan, times=64)
    assert [type(plan) for plan in ask("prefill-first", view, policy)] == [Decode]


def test_prefill_first_preempts_the_newest():
    runs = [running("old", 0, (0, 200)), running("new", 1, (0, 200))]
    plans = ask("prefill-first", cluster(1, runs=runs))
    assert plans[0] == Preempt(("new",))
    assert isinstance(plans[1], Decode)
    assert plans[1].request_ids == ("old",)


def test_prefill_first_is_one_instance():
    with pytest.raises(ConfigError, match=r"one instance of all devices, got 4 instances of tp=1: give .* --tp 4"):
        policy_for("prefill-first", cluster(4))
