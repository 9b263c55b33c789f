"""How Hopper's kernel deals out its query blocks: all of them, once, and as evenly as a causal mask allows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loongjax.pallas_kernels.prefill_attention.mosaic_gpu_launch import causal_imbalance, choose_heads_abreast
from loongjax.pallas_kernels.prefill_attention.mosaic_gpu_schedule import Schedule

NUM_PROCESSORS = 132


def items_of(schedule: Schedule) -> list[list[tuple[int, int]]]:
    """By thread block, its query blocks and heads in turn."""
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
    assert sorted(items) == [(q_block, head) for q_block in range(num_q_blocks) for head in range(8)]


def test_a_set_of_heads_begins_when_the_one_before_is_dealt_out():
    (items,) = items_of(Schedule(4, 3, 1, 2))
    assert [head // 2 for _, head in items] == [0] * 6 + [1] * 6
    assert [q_block for q_block, _ in items] == [2, 2, 1, 1, 0, 0] * 2


@pytest.mark.parametrize("heads", [(32, 32), (32, 8), (8, 1), (28, 4), (5, 1), (6, 3)])
@pytest.mark.parametrize("num_q_blocks", [1, 32, 128, 512, 1024, 8192])
def test_a_set_holds_all_queries_of_its_key_heads(heads, num_q_blocks):
    num_q_heads, num_kv_heads = heads
    abreast = choose_heads_abreast(num_q_heads, num_kv_heads, num_q_blocks, NUM_PROCESSORS)
    assert num_q_heads % abreast == 0
    assert abreast % (num_q_heads // num_kv_heads) == 0


def test_long_prompts_are_computed_a_few_heads_at_a_time_and_short_ones_all_at_once():
    chosen = [choose_heads_abreast(32, 32, num_q_blocks, NUM_PROCESSORS) for num_q_blocks in (32, 128, 512, 1024)]
    assert chosen == [32, 32, 1, 1]
    assert choose_heads_abreast(32, 8, 1024, NUM_PROCESSORS) == 4


@pytest.mark.parametrize("heads", [(32, 32), (32, 8), (8, 1), (28, 4)])
@pytest.mark.parametrize("num_q_blocks", [256, 512, 1024])
def test_under_a_causal_mask_no_thread_block_works_much_longer_than_another(heads, num_q_blocks):
    num_q_heads, num_kv_heads = heads
    abreast = choose_heads_abreast(num_q_heads, num_kv_heads, num_q_blocks, NUM_PROCESSORS)
    dealt = items_of(Schedule(num_q_heads, num_q_blocks, NUM_PROCESSORS, abreast))
    visits = [sum(q_block + 1 for q_block, _ in mine) for mine in dealt]
    assert max(visits) <= 1.02 * np.mean(visits)
    schedule = Schedule(num_q_heads, num_q_blocks, NUM_PROCESSORS, abreast)
    assert causal_imbalance(schedule) == pytest.approx(max(visits) / np.mean(visits))
