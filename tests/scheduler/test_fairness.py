"""What the simple policy remembers: enough to be fair, and no more than the living need."""

from loongjax.core.plan import Decode, Prefill
from loongjax.scheduler.fairness import Fairness
from loongjax.scheduler.residents import Residents
from loongjax.scheduler.simple import SimplePolicy
from loongjax.scheduler.simple_config import SimplePolicyConfig
from tests.scheduler.views import cluster, running, waiting


def memories(fairness: Fairness) -> int:
    return sum(len(memory) for memory in vars(fairness).values() if isinstance(memory, dict | set))


def fairness() -> Fairness:
    return Fairness(max_prefills_before_decode=1, max_overtakes=1)


def test_a_copy_goes_its_own_way():
    original = fairness()
    original.note_passed([running("a", 0, (0, 4))])
    copied = original.copy()
    assert copied.is_overdue(running("a", 0, (0, 4)))
    copied.note_decoded([running("a", 0, (0, 4))])
    copied.note_overtaken(waiting("w", 1, 4))
    copied.note_starved([running("b", 2, (1, 4))])
    copied.note_migrated(running("c", 3, (1, 4)))
    assert original.is_overdue(running("a", 0, (0, 4)))
    assert original.may_overtake(waiting("w", 1, 4))
    assert original.may_migrate(running("c", 3, (1, 4)), 100)
    assert memories(original) == 1


def test_what_a_copied_policy_answers_is_not_remembered_by_the_original():
    policy = SimplePolicy(SimplePolicyConfig(max_overtakes=2, max_prefills_before_decode=100))
    runs = [running("a", 0, (0, 40)), running("old", 1, (1, 40), is_in_flight=True)]
    view = cluster(2, runs=runs, prefilling=[1], waits=[waiting("big", 2, 400), waiting("small", 3, 4)])
    rehearsing = policy.copy()
    assert [type(rehearsing.plan(view)[0]) for _ in range(3)] == [Prefill, Prefill, Decode]
    assert type(rehearsing.copy().plan(view)[0]) is Decode
    assert type(policy.plan(view)[0]) is Prefill


def test_a_request_that_was_prefilled_starts_anew_if_it_waits_again():
    memory, request = fairness(), waiting("a", 0, 4)
    memory.note_overtaken(request)
    assert not memory.may_overtake(request)
    memory.note_prefilled([request])
    assert memory.may_overtake(request)
    assert memories(memory) == 0


def test_the_dead_are_forgotten_in_time():
    memory = fairness()
    alive = running("alive", 0, (0, 4))
    for i in range(1000):
        memory.note_migrated(running(f"r{i}", i, (0, 4)))
        memory.note_migrated(alive)
        memory.prune(Residents.of([alive], 1), [])
        assert memories(memory) <= 2 + 64
    assert not memory.may_migrate(alive, 10)


def test_prefills_are_barred_where_an_overdue_request_has_keys_and_everywhere_if_it_lacks_a_page():
    """A page may become free on any instance, and prefills would take it."""
    memory, late = fairness(), running("late", 0, (1, 4), (2, 4))
    residents = Residents.of([late, running("other", 1, (3, 4))], 4)
    assert memory.barred_instances(residents) == set()
    memory.note_passed([late])
    assert memory.barred_instances(residents) == {1, 2}
    memory.note_starved([late])
    assert memory.barred_instances(residents) == {0, 1, 2, 3}
    memory.note_decoded([late])
    assert memory.barred_instances(residents) == set()
