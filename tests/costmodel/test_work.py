import dataclasses

import numpy as np
import pytest

from loongjax.core.cluster import Group
from loongjax.core.iteration import ExtendInput, ExtendIteration, InstanceTable
from loongjax.core.request import Request
from loongjax.core.sampling import SamplingParams
from loongjax.costmodel.iteration_work import work_of
from loongjax.costmodel.work import DecodeTotals, DecodeWork, PrefillTotals, PrefillWork, Strategy
from loongjax.errors import ConfigError


def test_totals_of_a_prefill_are_sums_over_its_requests():
    work = PrefillWork(new_lens=(3, 5), past_lens=(10, 0))
    assert work.num_tokens == 8
    assert work.squared_lens == 9 + 25
    assert work.new_times_past == 30
    assert work.totals.twice_num_pairs.item() == 34 + 60


def test_each_request_reads_its_keys_once_and_computes_with_them_once_a_new_token():
    work = PrefillWork(new_lens=(512, 1, 2, 1), past_lens=(8192, 4000, 10, 0))
    assert work.new_times_past == 512 * 8192 + 4000 + 2 * 10
    assert work.past_keys == 8192 + 4000 + 10
    assert work.totals.past_keys.item() == 12_202
    np.testing.assert_array_equal(PrefillTotals.of([work, PrefillWork(new_lens=(1,))]).past_keys, [12_202, 0])


def test_an_extend_is_the_work_of_its_chunks_and_its_decodes():
    def item(name: str, num_tokens: int, position: int) -> ExtendInput:
        request = Request(
            request_id=name, prompt_token_ids=(0,) * 8192, sampling=SamplingParams(), max_tokens=9, seed=0
        )
        slots = np.arange(num_tokens, dtype=np.int32)
        table = InstanceTable(0, np.zeros(1, np.int32), position + num_tokens)
        return ExtendInput(request, slots, position, slots, table, (), False)

    iteration = ExtendIteration(0, Group((0,)), (item("chunk", 512, 1024), item("decode", 1, 9000)))
    assert work_of(iteration) == PrefillWork(new_lens=(512, 1), past_lens=(1024, 9000))


def test_twice_the_pairs_of_a_prompt_are_those_of_its_chunks():
    whole = PrefillWork(new_lens=(300,)).totals
    chunks = PrefillTotals.of([PrefillWork(new_lens=(100,), past_lens=(past,)) for past in (0, 100, 200)])
    assert whole.twice_num_pairs.item() == chunks.twice_num_pairs.sum()


def test_twice_the_pairs_count_a_causal_mask_with_half_its_diagonal():
    past, new = 7, 5
    mask = np.tril(np.ones((new, past + new)), k=past)
    pairs = mask.sum() - 0.5 * new
    totals = PrefillWork(new_lens=(new,), past_lens=(past,)).totals
    assert totals.twice_num_pairs.item() == 2 * pairs


def test_totals_of_many_batches_are_arrays_in_their_order():
    totals = PrefillTotals.of([PrefillWork(new_lens=(1,)), PrefillWork(new_lens=(2, 2), past_lens=(1, 3))])
    np.testing.assert_array_equal(totals.num_tokens, [1, 4])
    np.testing.assert_array_equal(totals.squared_lens, [1, 8])
    np.testing.assert_array_equal(totals.new_times_past, [0, 8])
    assert totals.num_tokens.dtype == np.float64


def test_a_first_chunk_is_an_extend_with_nothing_in_the_pool_yet():
    chunk, prompt = PrefillWork(new_lens=(4, 4), past_lens=(0, 0)), PrefillWork(new_lens=(4, 4))
    assert (chunk.is_extend, prompt.is_extend) == (True, False)
    assert PrefillTotals.of([chunk, prompt]).is_extend.tolist() == [1.0, 0.0]
    assert chunk.past_keys == chunk.new_times_past == 0


@pytest.mark.parametrize(
    ("new_lens", "past_lens"), [((), ()), ((0,), ()), ((4, -1), ()), ((4,), (1, 2)), ((4,), (-1,))]
)
def test_a_prefill_that_cannot_be_is_refused(new_lens, past_lens):
    with pytest.raises(ConfigError):
        PrefillWork(new_lens=new_lens, past_lens=past_lens)


def test_totals_of_decodes_name_the_busiest_master_and_instance():
    totals = DecodeTotals.of([DecodeWork(rows=(3, 2), keys=(100, 700, 50)), DecodeWork(rows=(1,), keys=(9,))])
    np.testing.assert_array_equal(totals.num_rows, [5, 1])
    np.testing.assert_array_equal(totals.num_masters, [2, 1])
    np.testing.assert_array_equal(totals.busiest_rows, [3, 1])
    np.testing.assert_array_equal(totals.busiest_keys, [700, 9])


def test_even_totals_are_those_of_the_most_even_work():
    totals = DecodeTotals.even(Strategy(4), num_rows=[7, 8], num_keys=[1001, 1000], num_masters=2)
    same = DecodeTotals.of(
        [DecodeWork(rows=(4, 3), keys=(251, 250, 250, 250)), DecodeWork(rows=(4, 4), keys=(250,) * 4)]
    )
    for name in ("num_rows", "busiest_rows", "busiest_keys"):
        np.testing.assert_array_equal(getattr(totals, name), getattr(same, name))


@pytest.mark.parametrize(("rows", "keys"), [((), (5,)), ((0,), (5,)), ((1, 1), (5,)), ((1,), (5, -1)), ((3,), (1, 1))])
def test_a_decode_that_cannot_be_is_refused(rows, keys):
    with pytest.raises(ConfigError):
        DecodeWork(rows=rows, keys=keys)


@pytest.mark.parametrize(("sp", "tp"), [(0, 1), (1, 0), (-2, 2)])
def test_a_strategy_without_devices_is_refused(sp, tp):
    with pytest.raises(ConfigError, match="at least one"):
        Strategy(sp, tp)


def test_strategies_are_ordered_and_say_what_they_are():
    assert sorted([Strategy(4, 1), Strategy(1, 2), Strategy(1, 1)]) == [Strategy(1, 1), Strategy(1, 2), Strategy(4, 1)]
    assert str(Strategy(4, 2)) == "sp4 tp2"


def test_the_totals_of_a_single_batch_are_those_of_its_work() -> None:
    work = PrefillWork(new_lens=(3, 5))
    single = PrefillTotals.of_batch(work.num_tokens, work.squared_lens)
    for field in dataclasses.fields(PrefillTotals):
        one, many = getattr(single, field.name), getattr(work.totals, field.name)
        assert [one] == many.tolist()
