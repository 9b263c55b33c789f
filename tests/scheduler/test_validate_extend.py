"""Which extends can be executed."""

import pytest

from loongjax.core.cluster import Group
from loongjax.core.plan import Chunk, Decode, Extend, Plan, Preempt, SubBatch
from loongjax.scheduler.validate import check_plan
from tests.scheduler.views import cluster, running, waiting

ZERO, ONE = Group.of([0]), Group.of([1])

VIEW = cluster(
    3,
    num_pages=5,
    runs=[
        running("decoding", 0, (0, 8)),
        running("part", 1, (0, 6), num_uncomputed_tokens=9),
        running("spread", 2, (1, 4), (2, 4)),
        running("flying", 3, (2, 4), is_in_flight=True),
        running("doubted", 7, (1, 4), is_suspect=True),
    ],
    decoding=[2],
    waits=[
        waiting("w", 4, 10),
        waiting("whole", 5, 4, needs_whole_prefill=True),
        waiting("suspect", 6, 4, is_suspect=True),
    ],
    max_num_batched_tokens=7,
    max_num_seqs=2,
)
"""Free pages: one on 0, three on 1, three on 2, which is busy."""


def extend(group: Group = ZERO, **chunks: int) -> Extend:
    return Extend(group, tuple(Chunk(name, num_tokens) for name, num_tokens in chunks.items()))


@pytest.mark.parametrize(
    "plans",
    [
        (extend(decoding=1, part=2),),
        (extend(part=6),),
        (extend(w=4),),
        (extend(ONE, w=7), extend(decoding=1)),
        (extend(ONE, suspect=3), extend(decoding=1, part=2)),
        (extend(ONE, doubted=1),),
        (Preempt(("decoding",)), extend(part=4)),
        (Preempt(("part",)),),
    ],
    ids=str,
)
def test_extends_that_can_be_executed_pass(plans: tuple[Plan, ...]):
    check_plan(VIEW, plans)


@pytest.mark.parametrize(
    ("plans", "reason"),
    [
        ((extend(Group.of([0, 1]), w=4),), "of one instance"),
        ((extend(),), "0 requests in an extend of 1 to 2"),
        ((extend(decoding=1, part=1, w=1),), "3 requests in an extend of 1 to 2"),
        ((extend(ONE, w=8),), "8 tokens in an extend of at most 7"),
        ((extend(decoding=2),), "2 tokens of 1"),
        ((extend(part=0),), "0 tokens of 9"),
        ((extend(decoding=1, part=3),), "part needs 1 pages of 0, which has 0"),
        ((extend(w=5),), "w needs 2 pages of 0, which has 1"),
        ((extend(ONE, part=1),), "holds keys elsewhere"),
        ((extend(ONE, spread=1),), "holds keys elsewhere"),
        ((extend(whole=1),), "has to be prefilled whole"),
        ((extend(suspect=1, part=1),), "suspect has to be alone"),
        ((extend(ONE, doubted=1, w=1),), "doubted has to be alone"),
        ((Decode(ONE, (SubBatch(1, ("doubted",)),)),), "doubted has to be computed by an extend of it alone"),
        ((extend(nobody=1),), "does not run"),
        ((extend(Group.of([2]), flying=1),), "instance 2 is busy"),
        ((Extend(ZERO, (Chunk("part", 1), Chunk("part", 1))),), "planned twice"),
        ((extend(part=1), extend(decoding=1)), "instance 0 is busy or taken"),
        ((Decode(ZERO, (SubBatch(0, ("part",)),)),), "part is partly prefilled"),
    ],
    ids=str,
)
def test_extends_that_cannot_be_executed_are_named(plans: tuple[Plan, ...], reason: str):
    with pytest.raises(AssertionError, match=reason):
        check_plan(VIEW, plans)
