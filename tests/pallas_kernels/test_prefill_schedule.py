"""How Hopper's kernel deals out its query blocks: all of them, once, and as evenly as a causal mask allows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loongjax.pallas_kernels.prefill_attention.mosaic_gpu_launch import causal_imbalance, choose_heads_abreast
from loongjax.pallas_kernels.prefill_attention.mosaic_gpu_schedule import Schedule, line_up
from loongjax.pallas_kernels.prefill_attention.visits import Visits

NUM_PROCESSORS = 132


def items_of(schedule: Schedule) -> list[list[tuple[int, int]]]:
    """By thread block, its query blocks' places in line and their heads, in turn."""
    most = -(-schedule.num_q_heads * schedule.num_q_blocks // schedule.num_programs)

    def of_program(_):
        return schedule.num_rounds, [schedule.item(jnp.int32(number)) for number in range(most)]

    rounds, items = jax.vmap(of_program, axis_name="program")(jnp.zeros(schedule.num_programs))
    items = np.array(items).transpose(2, 0, 1)
    return [[(int(q), int(head)) for q, head in mine[:num]] for num, mine in zip(rounds, items, strict=True)]


@pytest.mark.parametrize("num_heads_abreast", [1, 2, 4, 8])
@pytest.mark.parametrize(("num_q_blocks", "num_programs"), [(1, 1), (5, 3), (5, 40), (7, 8), (13, 5)])
def test_every_query_block_of_every_head_has_one_thread_block(num_q_blocks, num_programs, num_heads_abreast):
    dealt = items_of(Schedule(8, num_q_blocks, num_programs, num_heads_abreast))
    items = [item for mine in dealt for item in mine]
    assert sorted(items) == [(place, head) for place in range(num_q_blocks) for head in range(8)]


def test_a_set_of_heads_begins_when_the_one_before_is_dealt_out_and_goes_the_other_way():
    (items,) = items_of(Schedule(6, 3, 1, 2))
    assert [head // 2 for _, head in items] == [0] * 6 + [1] * 6 + [2] * 6
    assert [place for place, _ in items] == [0, 0, 1, 1, 2, 2, 2, 2, 1, 1, 0, 0, 0, 0, 1, 1, 2, 2]


def lined_up(num_blocks: list[int], *, by_length: bool) -> np.ndarray:
    """What `line_up` gives for query blocks of so many visits, whose other columns say whose they are."""
    count = len(num_blocks)
    others = [jnp.arange(count, dtype=jnp.int32) + 100 * column for column in range(1, 4)]
    visits = Visits(others[0], jnp.asarray(num_blocks, jnp.int32), others[1], others[2])
    return np.asarray(line_up(visits, by_length=by_length))


def test_the_last_query_blocks_come_first():
    line = lined_up([1, 2, 3], by_length=False)
    assert line.tolist() == [[2, 102, 3, 202, 302], [1, 101, 2, 201, 301], [0, 100, 1, 200, 300]]


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=40))
def test_by_length_those_that_visit_most_come_first_and_of_equal_ones_the_last(num_blocks):
    line = lined_up(num_blocks, by_length=True)
    expected = sorted(range(len(num_blocks)), key=lambda number: (-num_blocks[number], -number))
    assert line[:, 0].tolist() == expected
    assert line.tolist() == [[n, 100 + n, num_blocks[n], 200 + n, 300 + n] for n in expected]


@pytest.mark.parametrize("heads", [(32, 32), (32, 8), (8, 1), (28, 4), (5, 1), (6, 3)])
@pytest.mark.parametrize("num_q_blocks", [1, 32, 128, 512, 1024, 8192])
def test_a_set_holds_all_queries_of_its_key_heads(heads, num_q_blocks):
    num_q_heads, num_kv_heads = heads
    abreast = choose_heads_abreast(num_q_heads, num_kv_heads, num_q_blocks, NUM_PROCESSORS)
    assert num_q_heads % abreast == 0
    assert abreast % (num_q_heads // num_kv_heads) == 0


def test_long_prompts_are_computed_a_few_heads_at_a_time_and_short_ones_all_at_once():
    chosen = [choose_heads_abreast(32, 32, num_q_blocks, NUM_PROCESSORS) for num_q_blocks in (16, 128, 512, 1024)]
    assert chosen == [32, 2, 1, 1]
    assert choose_heads_abreast(32, 8, 1024, NUM_PROCESSORS) == 4


@pytest.mark.parametrize("heads", [(32, 32), (32, 8), (8, 1), (28, 4)])
@pytest.mark.parametrize("num_q_blocks", [256, 512, 1024])
def test_under_a_causal_mask_no_thread_block_works_much_longer_than_another(heads, num_q_blocks):
    """Nor begins items at another time: it would be at other keys, of which the second cache holds 400 blocks."""
    num_q_heads, num_kv_heads = heads
    abreast = choose_heads_abreast(num_q_heads, num_kv_heads, num_q_blocks, NUM_PROCESSORS)
    schedule = Schedule(num_q_heads, num_q_blocks, NUM_PROCESSORS, abreast)
    rounds = visits_by_round(schedule, list(range(num_q_blocks, 0, -1)))
    busy = rounds.sum(axis=0)
    assert busy.max() <= 1.02 * busy.mean()
    assert causal_imbalance(schedule) == pytest.approx(busy.max() / busy.mean())
    begins = rounds.cumsum(axis=0) - rounds
    assert (begins.max(axis=1) - begins.min(axis=1)).max() <= 256


def visits_by_round(schedule: Schedule, line: list[int]) -> np.ndarray:
    """Key blocks visited, [rounds, thread blocks], if the query blocks in line visit so many."""
    dealt = items_of(schedule)
    rounds = np.zeros((max(map(len, dealt)), len(dealt)), int)
    for program, items in enumerate(dealt):
        rounds[: len(items), program] = [line[place] for place, _ in items]
    return rounds
