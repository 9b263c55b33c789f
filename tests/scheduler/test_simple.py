import pytest

from loongjax.core.cluster import Group
from loongjax.core.plan import Decode, Migrate, Plan, Preempt, Prefill, SubBatch
from loongjax.errors import ConfigError
from loongjax.scheduler.simple import SimplePolicy
from loongjax.scheduler.simple_config import SimplePolicyConfig
from loongjax.scheduler.validate import check_plan
from loongjax.scheduler.view import ClusterView
from tests.scheduler.views import cluster, running, waiting

CONFIG = SimplePolicyConfig(
    prefill_tokens_per_instance=32, max_requests_per_master=4, growth_tokens=4, max_migrated_tokens=0
)


def ask(view: ClusterView, policy: SimplePolicy | None = None) -> tuple[Plan, ...]:
    plans = (policy or SimplePolicy(CONFIG)).plan(view)
    check_plan(view, plans)
    return plans


def keepers(plan: Plan) -> set[int]:
    assert isinstance(plan, Prefill)
    return {interval.instance for request in plan.requests for interval in request.kept}


@pytest.mark.parametrize(("num_tokens", "dop"), [(1, 1), (32, 1), (33, 2), (96, 3), (97, 4), (5000, 4)])
def test_the_degree_of_parallelism_of_a_prefill_follows_the_prompt(num_tokens: int, dop: int):
    (plan,) = ask(cluster(num_pages=2000, waits=[waiting("a", 0, num_tokens)]))
    assert isinstance(plan, Prefill)
    assert plan.group.dop == dop


def test_a_prompt_above_the_batch_limit_of_one_instance_gets_more():
    policy = SimplePolicy(SimplePolicyConfig(prefill_tokens_per_instance=1000))
    (plan,) = ask(cluster(waits=[waiting("a", 0, 50)], max_num_batched_tokens=20), policy)
    assert isinstance(plan, Prefill)
    assert plan.group.dop == 3


def test_a_suspect_is_prefilled_alone():
    waits = [waiting("a", 0, 4), waiting("suspect", 1, 4, is_suspect=True), waiting("b", 2, 4), waiting("c", 3, 4)]
    plans = ask(cluster(2, waits=waits))
    batches = [[request.request_id for request in plan.requests] for plan in plans if isinstance(plan, Prefill)]
    assert batches == [["a", "b", "c"], ["suspect"]]


def test_suspects_take_turns_on_one_instance():
    waits = [waiting(name, order, 4, is_suspect=True) for order, name in enumerate("abc")]
    (plan,) = ask(cluster(1, waits=waits))
    assert isinstance(plan, Prefill)
    assert [request.request_id for request in plan.requests] == ["a"]


def test_keys_stay_on_the_fewest_instances_and_the_emptiest():
    (plan,) = ask(cluster(waits=[waiting("a", 0, 128)], taken={0: 50, 1: 10, 2: 50, 3: 50}))
    assert isinstance(plan, Prefill)
    assert plan.group.dop == 4
    assert keepers(plan) == {1}


def test_keys_beyond_one_instance_span_the_fewest():
    (plan,) = ask(cluster(num_pages=20, waits=[waiting("a", 0, 128)]))
    assert len(keepers(plan)) == 2


def test_a_short_prompt_whose_keys_fit_no_instance_spans_several():
    (plan,) = ask(cluster(num_pages=6, waits=[waiting("a", 0, 30)]))
    assert len(keepers(plan)) == 2


def test_a_prompt_that_one_instance_could_hold_is_not_scattered_over_occupied_ones():
    runs = [running("a", 0, (0, 20)), running("b", 1, (1, 20))]
    plans = ask(cluster(2, num_pages=10, runs=runs, waits=[waiting("c", 2, 24)]))
    assert [type(plan) for plan in plans] == [Decode, Decode]


def test_short_prompts_spread_over_idle_instances():
    plans = ask(cluster(waits=[waiting(f"w{i}", i, 10) for i in range(4)]))
    assert {plan.group for plan in plans if isinstance(plan, Prefill)} == {Group.of([i]) for i in range(4)}


def test_more_short_prompts_than_instances_are_batched():
    plans = ask(cluster(waits=[waiting(f"w{i}", i, 10) for i in range(10)]))
    sizes = sorted(len(plan.requests) for plan in plans if isinstance(plan, Prefill))
    assert sizes == [2, 2, 3, 3]


def test_a_request_without_output_keeps_no_keys():
    (plan,) = ask(cluster(taken=dict.fromkeys(range(4), 100), waits=[waiting("a", 0, 10, keeps_kv=False)]))
    assert isinstance(plan, Prefill)
    assert plan.requests[0].kept == ()


def test_a_prefill_goes_before_the_decodes_of_its_instance():
    (plan,) = ask(cluster(1, runs=[running("a", 0, (0, 10))], waits=[waiting("b", 1, 10)]))
    assert isinstance(plan, Prefill)


def test_a_prefill_prefers_instances_without_keys():
    plans = ask(cluster(2, runs=[running("a", 0, (0, 10))], waits=[waiting("b", 1, 10)]))
    assert [type(plan) for plan in plans] == [Prefill, Decode]
    assert [plan.group for plan in plans if not isinstance(plan, Preempt | Migrate)] == [Group.of([1]), Group.of([0])]


def test_decodes_come_first_once_they_let_enough_prefills_pass():
    policy = SimplePolicy(SimplePolicyConfig(max_prefills_before_decode=3))
    kinds = [
        type(ask(cluster(1, runs=[running("a", 0, (0, 10))], waits=[waiting(f"w{i}", i + 1, 4)]), policy)[0])
        for i in range(8)
    ]
    assert kinds == [Prefill, Prefill, Prefill, Decode, Prefill, Prefill, Prefill, Decode]


def test_a_prefill_leaves_room_for_running_requests_to_grow():
    runs = [running("a", 0, (0, 36))]
    assert isinstance(ask(cluster(1, num_pages=12, runs=runs, waits=[waiting("b", 1, 4)]))[0], Prefill)
    assert isinstance(ask(cluster(1, num_pages=12, runs=runs, waits=[waiting("b", 1, 12)]))[0], Decode)


def test_a_long_prompt_waits_for_a_decode_step_and_keeps_idle_instances_free():
    view = cluster(
        2,
        runs=[running("a", 0, (0, 10)), running("b", 1, (1, 10), is_in_flight=True)],
        decoding=[1],
        waits=[waiting("c", 2, 64)],
    )
    assert ask(view) == ()


def test_a_long_prompt_does_not_wait_for_another_prefill():
    view = cluster(2, runs=[running("b", 1, (1, 10), is_in_flight=True)], prefilling=[1], waits=[waiting("c", 2, 64)])
    (plan,) = ask(view)
    assert isinstance(plan, Prefill)
    assert plan.group == Group.of([0])


def test_later_requests_overtake_one_that_does_not_fit_a_bounded_number_of_times():
    policy = SimplePolicy(SimplePolicyConfig(max_overtakes=2, max_prefills_before_decode=100))
    runs = [running("a", 0, (0, 40)), running("old", 1, (1, 40), is_in_flight=True)]
    kinds = []
    for i in range(4):
        waits = [waiting("big", 2, 400), waiting(f"w{i}", 3 + i, 4)]
        kinds.append(type(ask(cluster(2, runs=runs, prefilling=[1], waits=waits), policy)[0]))
    assert kinds == [Prefill, Prefill, Decode, Decode]


def test_each_instance_decodes_on_its_own():
    plans = ask(cluster(runs=[running(f"r{i}", i, (i % 4, 10)) for i in range(8)]))
    assert plans == tuple(Decode(Group.of([i]), (SubBatch(i, (f"r{i}", f"r{i + 4}")),)) for i in range(4))


def test_a_request_on_two_instances_joins_their_decodes():
    runs = [running("a", 0, (0, 10), (1, 5)), running("b", 1, (0, 10)), running("c", 2, (2, 10))]
    assert ask(cluster(3, runs=runs)) == (
        Decode(Group.of([0, 1]), (SubBatch(0, ("b",)), SubBatch(1, ("a",)))),
        Decode(Group.of([2]), (SubBatch(2, ("c",)),)),
    )


def test_a_decode_group_waits_for_a_step_on_one_of_its_instances():
    runs = [running("a", 0, (0, 10), (1, 5)), running("b", 1, (1, 10), is_in_flight=True)]
    assert ask(cluster(2, runs=runs, decoding=[1])) == ()


def test_a_decode_does_not_wait_for_a_prefill_that_stalls_only_others():
    runs = [
        running("a", 0, (0, 10), (1, 5)),
        running("b", 1, (0, 10)),
        running("c", 2, (1, 10), is_in_flight=True),
    ]
    assert ask(cluster(2, runs=runs, prefilling=[1])) == (Decode(Group.of([0]), (SubBatch(0, ("b",)),)),)


def test_a_full_instance_scales_up_to_one_without_keys():
    (plan,) = ask(cluster(2, num_pages=5, runs=[running("a", 0, (0, 20))]))
    assert plan == Decode(Group.of([0, 1]), (SubBatch(1, ("a",)),))


def test_a_request_with_room_in_its_last_page_keeps_its_master():
    runs = [running("a", 0, (0, 8)), running("b", 1, (0, 11))]
    (plan,) = ask(cluster(2, num_pages=5, runs=runs))
    assert plan == Decode(Group.of([0, 1]), (SubBatch(0, ("b",)), SubBatch(1, ("a",))))


def test_a_full_instance_merges_with_one_that_holds_other_keys():
    (plan,) = ask(cluster(2, num_pages=5, runs=[running("a", 0, (0, 20)), running("b", 1, (1, 6))]))
    assert plan == Decode(Group.of([0, 1]), (SubBatch(1, ("a", "b")),))


def test_a_full_instance_waits_for_memory_that_a_decode_step_makes_available():
    runs = [running("a", 0, (0, 20)), running("b", 1, (1, 6), is_in_flight=True)]
    assert ask(cluster(2, num_pages=5, runs=runs, decoding=[1])) == ()


def test_a_large_batch_scales_up_to_more_masters():
    (plan,) = ask(cluster(3, runs=[running(f"r{i}", i, (0, 10)) for i in range(10)]))
    assert isinstance(plan, Decode)
    assert plan.masters == (0, 1, 2)
    assert all(len(batch.request_ids) <= 4 for batch in plan.sub_batches)


def test_a_sub_batch_never_exceeds_its_limit():
    (plan,) = ask(cluster(1, runs=[running(f"r{i}", i, (0, 2)) for i in range(10)], max_num_seqs=3))
    assert plan == Decode(Group.of([0]), (SubBatch(0, ("r0", "r1", "r2")),))


def test_the_newest_request_is_preempted_when_the_pool_is_full():
    runs = [running("old", 0, (0, 8)), running("mid", 1, (0, 6)), running("new", 2, (0, 4))]
    plans = ask(cluster(1, num_pages=5, runs=runs))
    assert plans == (Preempt(("new",)), Decode(Group.of([0]), (SubBatch(0, ("old", "mid")),)))


def test_a_lone_request_gets_the_pages_of_a_younger_one_elsewhere():
    runs = [running("old", 0, (0, 20)), running("new", 1, (1, 20))]
    plans = ask(cluster(2, num_pages=5, runs=runs))
    assert plans == (Preempt(("new",)), Decode(Group.of([0, 1]), (SubBatch(1, ("old",)),)))


def test_the_oldest_request_gets_room_by_preempting_the_newest():
    runs = [running("b", 1, (0, 8)), running("c", 2, (0, 8))]
    plans = ask(cluster(1, num_pages=5, runs=runs, waits=[waiting("a", 0, 10)]))
    assert [type(plan) for plan in plans] == [Preempt, Prefill]
    assert plans[0] == Preempt(("c",))


def test_a_younger_request_waits_instead_of_preempting():
    runs = [running("a", 0, (0, 8)), running("b", 1, (0, 7))]
    (plan,) = ask(cluster(1, num_pages=5, runs=runs, waits=[waiting("c", 2, 10)]))
    assert isinstance(plan, Decode)


def test_a_few_straddling_keys_are_migrated_to_free_an_instance():
    policy = SimplePolicy(SimplePolicyConfig(max_migrated_tokens=8))
    runs = [running("a", 0, (0, 30), (1, 6)), running("b", 1, (1, 10))]
    assert ask(cluster(2, runs=runs), policy) == (Migrate("a", 1, 0, 6),)


def test_many_straddling_keys_stay_where_they_are():
    policy = SimplePolicy(SimplePolicyConfig(max_migrated_tokens=8))
    (plan,) = ask(cluster(2, runs=[running("a", 0, (0, 30), (1, 9))]), policy)
    assert isinstance(plan, Decode)


def test_a_request_is_not_migrated_again_before_it_has_grown():
    policy = SimplePolicy(SimplePolicyConfig(max_migrated_tokens=8, min_tokens_between_migrations=5))
    view = cluster(2, runs=[running("a", 0, (0, 30), (1, 6))])
    assert isinstance(ask(view, policy)[0], Migrate)
    assert isinstance(ask(view, policy)[0], Decode)
    assert isinstance(ask(cluster(2, runs=[running("a", 0, (0, 35), (1, 6))]), policy)[0], Migrate)


def test_nothing_is_planned_when_every_instance_is_busy():
    assert ask(cluster(2, decoding=[0], prefilling=[1], waits=[waiting("a", 0, 10)])) == ()


@pytest.mark.parametrize(
    "field", ["prefill_tokens_per_instance", "max_requests_per_master", "max_prefills_before_decode"]
)
def test_a_setting_that_cannot_work_is_refused_by_name(field: str):
    with pytest.raises(ConfigError, match=f"{field} must be at least 1, got 0"):
        SimplePolicyConfig(**{field: 0})
