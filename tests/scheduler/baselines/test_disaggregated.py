import pytest

from loongjax.config import SchedulingConfig
from loongjax.core.cluster import Group
from loongjax.core.plan import Decode, Migrate, Prefill
from loongjax.errors import ConfigError
from loongjax.scheduler.build import build_policy
from tests.scheduler.baselines.questions import ask, groups, policy_for
from tests.scheduler.views import cluster, running, waiting


def test_prompts_are_prefilled_on_the_first_instances_and_keys_stay_there():
    plans = ask("disaggregated", cluster(4, waits=[waiting(f"w{i}", i, 10) for i in range(4)]))
    assert groups(plans) == [Group((0,)), Group((1,))]
    assert all(isinstance(plan, Prefill) for plan in plans)


def test_keys_are_handed_to_the_roomiest_decode_instance():
    runs = [running("done", 0, (0, 30)), running("x", 1, (2, 50)), running("y", 2, (3, 10))]
    plans = ask("disaggregated", cluster(4, runs=runs))
    assert plans[0] == Migrate("done", 0, 3, 30)
    assert groups(plans) == [Group((2,))]


def test_a_prefill_instance_waits_for_the_hand_over():
    runs = [running("done", 0, (0, 30)), running("x", 1, (1, 50), is_in_flight=True)]
    view = cluster(2, runs=runs, waits=[waiting("w", 2, 10)], decoding=[1])
    assert ask("disaggregated", view) == ()


def test_a_prefill_instance_goes_on_if_no_decode_instance_has_room():
    runs = [running("done", 0, (0, 30)), running("x", 1, (1, 380))]
    plans = ask("disaggregated", cluster(2, runs=runs, waits=[waiting("w", 2, 10)]))
    assert [type(plan) for plan in plans] == [Prefill, Decode]


def test_the_room_that_the_oldest_waits_for_is_not_given_to_others():
    # The oldest one's instance prefills; the younger one would take the memory that it needs.
    runs = [
        running("oldest", 0, (0, 200)),
        running("younger", 1, (1, 150)),
        running("z", 2, (2, 100)),
        running("p", 3, (0, 8), is_in_flight=True),
    ]
    plans = ask("disaggregated", cluster(3, runs=runs, prefilling=[0]), policy_for("disaggregated", cluster(3), 2))
    assert not any(isinstance(plan, Migrate) for plan in plans)


def test_a_handed_over_request_decodes_where_it_is():
    (plan,) = ask("disaggregated", cluster(2, runs=[running("x", 1, (1, 50))]))
    assert isinstance(plan, Decode)
    assert plan.group == Group((1,))


@pytest.mark.parametrize("count", [0, 4, 5])
def test_instances_must_be_left_for_both(count: int):
    shape = cluster(4).shape
    config = SchedulingConfig(policy="disaggregated")
    object.__setattr__(config, "num_prefill_instances", count)
    with pytest.raises(ConfigError, match="--num-prefill-instances must be from 1 to 3"):
        build_policy(config, shape=shape, max_num_seqs=4)
    with pytest.raises(ConfigError, match="raise --num-instances"):
        build_policy(config, shape=cluster(1).shape, max_num_seqs=4)
