"""Which decodes go on from which."""

import itertools

import pytest

from loongjax.core.cluster import Group
from loongjax.core.plan import Decode, SubBatch


def decode(*batches: tuple[int, str], group: tuple[int, ...] = (0, 1)) -> Decode:
    return Decode(Group.of(group), tuple(SubBatch(master, tuple(names)) for master, names in batches))


BEFORE = decode((0, "abc"), (1, "de"))


@pytest.mark.parametrize(
    "after",
    [
        BEFORE,
        decode((0, "abc"), (1, "e")),
        decode((0, "ac"), (1, "d")),
        decode((0, "abc")),
        decode((1, "de")),
        decode((1, "d"), (0, "b")),
    ],
)
def test_a_decode_goes_on_as_it_was_or_without_some(after: Decode):
    assert after.goes_on_from(BEFORE)


@pytest.mark.parametrize(
    "after",
    [
        decode((0, "abcf"), (1, "de")),
        decode((0, "ab"), (1, "cde")),
        decode((0, "acb"), (1, "de")),
        decode((0, "abc"), (1, "de"), group=(0, 1, 2)),
        decode((1, "de"), group=(1,)),
        decode((2, "abc"), group=(1, 2)),
        decode((0, "aa")),
    ],
)
def test_it_does_not_where_somebody_joins_moves_changes_places_or_the_group_is_another(after: Decode):
    assert not after.goes_on_from(BEFORE)


def test_of_all_orders_of_all_parts_those_that_keep_the_order_go_on():
    for number in range(1, 5):
        for names in itertools.permutations("abcd", number):
            is_kept = "".join(names) == "".join(name for name in "abcd" if name in names)
            assert decode((0, "".join(names))).goes_on_from(decode((0, "abcd"))) == is_kept
