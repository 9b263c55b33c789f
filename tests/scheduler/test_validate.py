import pytest

from loongjax.core.cluster import Group
from loongjax.core.plan import Decode, Migrate, Plan, Preempt, Prefill, PrefillRequest, SubBatch, TokenInterval
from loongjax.scheduler.validate import check_plan
from tests.scheduler.views import cluster, running, waiting

ALL = Group.of([0, 1])
ZERO = Group.of([0])
ONE = Group.of([1])

VIEW = cluster(
    3,
    num_pages=5,
    runs=[
        running("a", 0, (0, 8), (1, 4)),
        running("b", 1, (1, 6)),
        running("full", 2, (0, 12)),
        running("flying", 3, (2, 4), is_in_flight=True),
    ],
    decoding=[2],
    waits=[waiting("w", 4, 10), waiting("echo", 5, 4, keeps_kv=False), waiting("v", 6, 4)],
    max_num_batched_tokens=11,
    max_num_seqs=2,
)
"""Free pages: none on 0, two on 1, four on 2, which is busy."""


def prefill(group: Group, **kept: tuple[tuple[int, int, int], ...]) -> Prefill:
    requests = tuple(
        PrefillRequest(name, tuple(TokenInterval(*part) for part in parts)) for name, parts in kept.items()
    )
    return Prefill(group, requests)


def decode(group: Group, **sub_batches: tuple[str, ...]) -> Decode:
    return Decode(group, tuple(SubBatch(int(name[1:]), names) for name, names in sub_batches.items()))


@pytest.mark.parametrize(
    "plans",
    [
        (),
        (decode(ALL, m1=("a", "b")),),
        (decode(ONE, m1=("b",)),),
        (decode(ALL, m1=("a", "full")),),
        (Preempt(("full",)), prefill(ALL, w=((0, 0, 8), (1, 8, 10)))),
        (Preempt(("a",)), decode(ZERO, m0=("full",)), prefill(ONE, v=((1, 0, 4),))),
        (prefill(ONE, echo=()),),
        (Migrate("a", 0, 1, 8),),
    ],
    ids=str,
)
def test_plans_that_can_be_executed_pass(plans: tuple[Plan, ...]):
    check_plan(VIEW, plans)


@pytest.mark.parametrize(
    ("plans", "reason"),
    [
        ((prefill(ONE, nobody=((1, 0, 4),)),), "does not wait"),
        ((prefill(ONE, b=((1, 0, 4),)),), "does not wait"),
        ((prefill(ONE, v=((1, 0, 4),)), prefill(ZERO, v=())), "does not wait, or is planned twice"),
        ((Prefill(ONE, ()),), "nothing to prefill"),
        ((prefill(Group.of([2]), v=((2, 0, 4),)),), "instance 2 is busy"),
        ((prefill(ONE, v=((1, 0, 4),)), decode(ONE, m1=("b",))), "instance 1 is busy or taken"),
        ((prefill(ONE, v=((0, 0, 4),)),), "cannot keep"),
        ((prefill(ONE, v=((1, 0, 3),)),), "keeps 3 tokens of 4"),
        ((prefill(ONE, v=()),), "keeps 0 tokens of 4"),
        ((prefill(ONE, echo=((1, 0, 4),)),), "needs no keys"),
        ((prefill(ALL, w=((1, 0, 4), (0, 8, 10))),), "does not tile"),
        ((prefill(ALL, w=((1, 0, 5), (0, 5, 10))),), "within a page"),
        ((prefill(ONE, w=((1, 0, 10),)),), "needs 3 pages of 1, which has 2"),
        ((prefill(ONE, v=((1, 0, 4),), echo=(), w=()),), "3 requests in a prefill of at most 2"),
        ((Preempt(("a", "b")), prefill(ONE, w=((1, 0, 10),), v=((1, 0, 4),))), "14 tokens in a prefill of at most 11"),
        ((decode(ONE, m1=("nobody",)),), "does not run"),
        ((decode(ONE, m1=("w",)),), "does not run"),
        ((decode(ONE, m1=("b", "b")),), "planned twice"),
        ((decode(ONE, m1=("flying",)),), "is in flight"),
        ((Preempt(("flying",)),), "is in flight"),
        ((decode(ONE, m1=("a",)),), "lacks 0, which holds keys of a"),
        ((decode(ONE, m0=("b",)),), "master 0 is not in"),
        ((Decode(ONE, (SubBatch(1, ("b",)), SubBatch(1, ("a",)))),), "two sub-batches"),
        ((Decode(ONE, ()),), "nothing to decode"),
        ((decode(ONE, m1=()),), "0 requests in a sub-batch"),
        ((decode(ALL, m1=("a", "b", "full")),), "3 requests in a sub-batch of 1 to 2"),
        ((decode(ALL, m0=("full",)),), "full needs 1 pages of 0, which has 0"),
        ((Preempt(("b",)), decode(ONE, m1=("b",))), "planned twice"),
        ((Preempt(()),), "nobody"),
        ((Migrate("b", 1, 1, 1),), "to itself"),
        ((Migrate("b", 0, 1, 1),), "1 tokens of 0"),
        ((Migrate("b", 1, 0, 6),), "needs 2 pages of 0"),
        ((Migrate("a", 0, 1, 9),), "9 tokens of 8"),
        ((Migrate("b", 1, 2, 1),), "instance 2 is busy"),
    ],
    ids=str,
)
def test_plans_that_cannot_be_executed_are_named(plans: tuple[Plan, ...], reason: str):
    with pytest.raises(AssertionError, match=reason):
        check_plan(VIEW, plans)


def test_a_suspect_with_company_is_found():
    view = cluster(1, waits=[waiting("a", 0, 4), waiting("suspect", 1, 4, is_suspect=True)])
    check_plan(view, (prefill(ZERO, suspect=((0, 0, 4),)),))
    with pytest.raises(AssertionError, match="suspect has to be alone"):
        check_plan(view, (prefill(ZERO, a=((0, 0, 4),), suspect=((0, 0, 4),)),))
