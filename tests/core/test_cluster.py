"""Groups are sets in canonical order."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loongjax.core.cluster import ClusterShape, Group

instances = st.sets(st.integers(0, 15), min_size=1)


@given(instances, st.randoms())
def test_equal_sets_are_equal_groups_in_whatever_order_they_are_given(members, random):
    shuffled = list(members)
    random.shuffle(shuffled)
    group = Group.of(shuffled)
    assert group == Group.of(members)
    assert hash(group) == hash(Group.of(members))
    assert group.instances == tuple(sorted(members))
    assert group.dop == len(members)


@given(instances)
def test_ranks_follow_the_canonical_order(members):
    group = Group.of(members)
    assert [group.rank_of(instance) for instance in sorted(members)] == list(range(group.dop))
    assert all(instance in group for instance in members)


@given(instances, instances)
def test_groups_are_disjoint_when_they_share_no_instance(left, right):
    assert Group.of(left).isdisjoint(Group.of(right)) is (not left & right)


@pytest.mark.parametrize("members", [(), (1, 0), (1, 1)])
def test_a_group_out_of_canonical_order_is_a_bug(members):
    with pytest.raises(AssertionError):
        Group(members)


@given(st.integers(1, 9), st.integers(0, 100), st.integers(1, 5))
def test_pages_for_tokens_are_rounded_up(page_size, num_tokens, num_instances):
    shape = ClusterShape(num_instances=num_instances, num_pages=7, page_size=page_size)
    assert (shape.num_pages_for(num_tokens) - 1) * page_size < num_tokens <= shape.num_pages_for(num_tokens) * page_size
    assert shape.num_slots == 7 * page_size
    assert shape.all_instances == tuple(range(num_instances))
