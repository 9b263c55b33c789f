import pytest
from hypothesis import given
from hypothesis import strategies as st

from loongjax.core.plan import TokenInterval
from loongjax.scheduler.placement import Shelf, keys_on, place_keys
from tests.scheduler.views import waiting


def test_the_emptiest_instance_is_chosen_when_it_suffices():
    (placed,) = place_keys([waiting("a", 0, 10)], [Shelf(0, 3, 9), Shelf(1, 5, 9), Shelf(2, 4, 9)], page_size=4)
    assert placed.kept == (TokenInterval(1, 0, 10),)


def test_room_for_growth_takes_another_instance():
    shelves = [Shelf(0, 3, 9), Shelf(1, 3, 9)]
    batch = [waiting("a", 0, 8), waiting("b", 1, 4)]
    placed = place_keys(batch, shelves, page_size=4, num_spare_pages=2)
    assert {part.instance for request in placed for part in request.kept} == {0, 1}


def test_a_cut_request_ends_where_most_room_is_left():
    (placed,) = place_keys([waiting("a", 0, 30)], [Shelf(0, 4, 9), Shelf(1, 4, 9), Shelf(2, 4, 9)], page_size=4)
    assert placed.kept == (TokenInterval(0, 0, 16), TokenInterval(1, 16, 30))


def test_full_masters_are_avoided():
    placed = place_keys([waiting("a", 0, 4), waiting("b", 1, 4)], [Shelf(0, 9, 1), Shelf(1, 5, 1)], page_size=4)
    assert [request.kept[0].instance for request in placed] == [0, 1]


def test_requests_without_keys_get_no_place():
    placed = place_keys([waiting("a", 0, 10, keeps_kv=False)], [Shelf(0, 0, 0)], page_size=4)
    assert placed[0].kept == ()


def test_on_one_instance_all_keys_stay_there():
    batch = [waiting("a", 0, 10), waiting("b", 1, 4, keeps_kv=False)]
    placed = keys_on(3, batch)
    assert [(request.request_id, request.kept) for request in placed] == [("a", (TokenInterval(3, 0, 10),)), ("b", ())]
    assert placed == place_keys(batch, [Shelf(3, 3, 9)], page_size=4)


def test_a_batch_that_does_not_fit_is_a_mistake_of_the_caller():
    with pytest.raises(AssertionError):
        place_keys([waiting("a", 0, 10)], [Shelf(0, 2, 9)], page_size=4)


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=6),
    st.lists(st.integers(0, 12), min_size=1, max_size=5),
    st.sampled_from([1, 3, 16]),
)
def test_whatever_fits_is_tiled_on_page_boundaries_within_the_room_given(
    lengths: list[int], rooms: list[int], page_size: int
):
    num_needed = sum(-(-length // page_size) for length in lengths)
    rooms = [*rooms, max(0, num_needed - sum(rooms))]
    batch = [waiting(f"r{i}", i, length) for i, length in enumerate(lengths)]
    placed = place_keys(batch, [Shelf(i, room, 2) for i, room in enumerate(rooms)], page_size=page_size)
    used = [0] * len(rooms)
    for length, request in zip(lengths, placed, strict=True):
        position = 0
        for part in request.kept:
            assert part.begin == position
            assert part.begin % page_size == 0
            used[part.instance] += -(-part.num_tokens // page_size)
            position = part.end
        assert position == length
    assert all(pages <= room for pages, room in zip(used, rooms, strict=True))
    num_keepers = len({part.instance for request in placed for part in request.kept})
    largest = sorted(rooms, reverse=True)
    needed = next(k for k in range(1, len(rooms) + 1) if sum(largest[:k]) >= num_needed)
    assert num_keepers <= max(needed, -(-len(lengths) // 2))
