"""Host arrays of prefill and decode say what the iteration says, wherever padding, striping and masters put it."""

import numpy as np
import pytest

from loongjax.core.cluster import ClusterShape, Group
from loongjax.core.iteration import (
    DecodeInput,
    DecodeIteration,
    DecodeSubBatch,
    ExtendInput,
    ExtendIteration,
    InstanceTable,
    KeptTokens,
    PrefillInput,
    PrefillIteration,
)
from loongjax.core.request import Request
from loongjax.core.sampling import SamplingParams
from loongjax.runtime.buckets import Buckets, fit, powers, token_sizes
from loongjax.runtime.packing import (
    DecodeRows,
    empty_decode,
    empty_prefill,
    pack_decode,
    pack_decode_slots,
    pack_extend,
    pack_prefill,
    pack_prompt_targets,
)
from loongjax.runtime.protocol import RuntimeLimits

BUCKETS = Buckets.for_limits(max_num_batched_tokens=48, max_num_seqs=6, num_pages=40)


def make_request(name: str, prompt: list[int], *, max_tokens: int = 4) -> Request:
    return Request(
        request_id=name,
        prompt_token_ids=tuple(prompt),
        sampling=SamplingParams(max_tokens=max_tokens),
        max_tokens=max_tokens,
        seed=0,
    )


def prefill_of(prompts: list[list[int]], group: Group, *, max_tokens=4, kept=(), wants=False) -> PrefillIteration:
    inputs = tuple(
        PrefillInput(
            make_request(f"r{i}", prompt, max_tokens=max_tokens),
            np.array(prompt, np.int32),
            tuple(item for index, item in kept if index == i),
            wants,
        )
        for i, prompt in enumerate(prompts)
    )
    return PrefillIteration(0, group, inputs)


def test_powers_end_with_the_limit_itself():
    assert powers(16, 100, 2) == (16, 32, 64, 100)
    assert powers(1, 1, 4) == (1,)
    assert powers(1, 64, 4) == (1, 4, 16, 64)
    assert powers(64, 48, 2) == (48,)


@pytest.mark.parametrize("most", [48, 64, 1000, 1024, 1025, 4160, 8192, 131_072])
def test_prompts_are_padded_by_at_most_a_half_and_long_ones_by_a_quarter(most):
    sizes = token_sizes(most)
    assert sizes[-1] == most
    assert list(sizes) == sorted(set(sizes))
    for num_tokens in range(1, most + 1, 97):
        padded = fit(num_tokens, sizes)
        factor = 1.25 if num_tokens > 4096 else 1.5 if num_tokens > 256 else 2
        assert padded <= max(64, factor * num_tokens)
    if most == 8192:
        assert sizes == (64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 5120, 6144, 7168, 8192)


def test_a_runtimes_sizes_are_those_of_its_limits():
    limits = RuntimeLimits(max_model_len=512, max_num_batched_tokens=256, max_num_seqs=16, vocab_size=9)
    buckets = Buckets.of(ClusterShape(num_instances=1, num_pages=7, page_size=4), limits)
    assert (buckets.num_tokens, buckets.num_rows) == ((64, 128, 256), (1, 4, 16))
    assert buckets.num_table_entries >= 7


def test_a_size_goes_to_the_smallest_bucket_that_holds_it():
    assert [fit(size, (4, 8, 12)) for size in (1, 4, 5, 8, 9, 12)] == [4, 4, 8, 8, 12, 12]
    with pytest.raises(AssertionError, match="largest bucket"):
        fit(13, (4, 8, 12))


@pytest.mark.parametrize("dop", [1, 2, 3, 5])
def test_token_i_of_the_packed_batch_is_on_rank_i_mod_n(dop):
    prompts = [[11, 12, 13, 14, 15], [21], [31, 32, 33]]
    packed = pack_prefill(prefill_of(prompts, Group.of(range(dop))), BUCKETS)
    flat = [token for prompt in prompts for token in prompt]
    starts = [0] * 5 + [5] + [6] * 3
    for i, (token, start) in enumerate(zip(flat, starts, strict=True)):
        assert packed.batch.token_ids[i % dop, i // dop] == token
        assert packed.batch.row_starts[i % dop, i // dop] == start
        assert packed.batch.positions[i % dop, i // dop] == i - start
    assert packed.batch.token_ids.shape == (dop, 48)
    assert packed.starts == (0, 5, 6)


@pytest.mark.parametrize("dop", [1, 3])
def test_padding_rows_see_nothing_and_are_kept_nowhere(dop):
    packed = pack_prefill(prefill_of([[1, 2, 3, 4]], Group.of(range(dop))), BUCKETS)
    for rank in range(dop):
        for row in range(48):
            if row * dop + rank >= 4:
                assert packed.batch.row_starts[rank, row] > row * dop + rank
                assert (packed.batch.kept_slots[:, rank, row] == -1).all()


def test_kept_slots_name_the_keeper_the_source_and_the_row():
    group = Group.of((2, 5))
    kept = [
        (0, KeptTokens(5, 0, 4, np.array([40, 41, 42, 43], np.int32))),
        (0, KeptTokens(2, 4, 6, np.array([7, 9], np.int32))),
        (1, KeptTokens(2, 0, 3, np.array([20, 21, 22], np.int32))),
    ]
    packed = pack_prefill(prefill_of([[1] * 6, [2] * 3], group, kept=kept), BUCKETS)
    flat = np.full((2, 96), -1)
    flat[1, 0:4] = [40, 41, 42, 43]
    flat[0, 4:6] = [7, 9]
    flat[0, 6:9] = [20, 21, 22]
    for keeper in range(2):
        for i in range(96):
            assert packed.batch.kept_slots[keeper, i % 2, i // 2] == flat[keeper, i]


@pytest.mark.parametrize("dop", [1, 2, 3])
def test_each_request_is_sampled_from_its_last_token_on_the_rank_that_has_it(dop):
    prompts = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10]]
    packed = pack_prefill(prefill_of(prompts, Group.of(range(dop))), BUCKETS)
    rows = packed.batch.sample_rows
    capacity = rows.shape[1] // dop
    ends = np.cumsum([len(prompt) for prompt in prompts])
    for sampler, indices in enumerate(packed.sampled):
        for row, i in enumerate(indices):
            last = ends[i] - 1
            expected = np.full(dop, -1)
            expected[last % dop] = last // dop
            np.testing.assert_array_equal(rows[:, sampler * capacity + row], expected)
            assert packed.positions[sampler, row] == len(prompts[i])
    assert sorted(i for indices in packed.sampled for i in indices) == [0, 1, 2, 3]
    assert (rows >= 0).sum() == 4


def test_sampling_is_spread_evenly_over_the_ranks():
    packed = pack_prefill(prefill_of([[1]] * 5, Group.of(range(2))), BUCKETS)
    assert [len(indices) for indices in packed.sampled] == [3, 2]
    assert packed.positions.shape == (2, 4)


@pytest.mark.parametrize("max_num_seqs", [1, 2, 4, 6, 64])
@pytest.mark.parametrize("dop", range(1, 9))
def test_every_rank_has_room_for_the_bucket_of_rows_that_it_samples(dop, max_num_seqs):
    buckets = Buckets.for_limits(max_num_batched_tokens=64, max_num_seqs=max_num_seqs, num_pages=40)
    for num_requests in range(1, max_num_seqs + 1):
        packed = pack_prefill(prefill_of([[1]] * num_requests, Group.of(range(dop))), buckets)
        assert packed.batch.sample_rows.shape[1] >= dop * packed.positions.shape[1]


def test_requests_without_output_are_not_sampled():
    packed = pack_prefill(prefill_of([[1, 2]], Group.of((0,)), max_tokens=0), BUCKETS)
    assert packed.sampled == ((),)
    assert (packed.batch.sample_rows == -1).all()


@pytest.mark.parametrize("dop", [1, 3])
def test_an_empty_prefill_has_the_shapes_of_a_real_one(dop):
    real = pack_prefill(prefill_of([[1, 2, 3]], Group.of(range(dop))), BUCKETS).batch
    empty = empty_prefill(dop, 48, BUCKETS)
    assert [(leaf.shape, leaf.dtype) for leaf in empty] == [(leaf.shape, leaf.dtype) for leaf in real]
    assert (empty.row_starts > 10**6).all()
    assert (empty.kept_slots == -1).all()


def test_prompt_targets_are_the_next_tokens_of_the_prompt_only():
    group = Group.of((0, 1))
    request = make_request("r", [1, 2, 3])
    inputs = (
        PrefillInput(request, np.array([1, 2, 3, 8, 9], np.int32), (), True),
        PrefillInput(make_request("q", [4, 5]), np.array([4, 5], np.int32), (), False),
    )
    iteration = PrefillIteration(0, group, inputs)
    targets = pack_prompt_targets(iteration, pack_prefill(iteration, BUCKETS))
    flat = [int(targets[i % 2, i // 2]) for i in range(8)]
    assert flat == [2, 3, -1, -1, -1, -1, -1, -1]


def decode_iteration(group: Group, sub_batches) -> DecodeIteration:
    """sub_batches: (master, [(prompt, output, slot, {instance: (pages, num_tokens)})])."""
    return DecodeIteration(
        0,
        group,
        tuple(
            DecodeSubBatch(
                master,
                tuple(
                    DecodeInput(
                        make_request(f"{master}-{i}", prompt),
                        tuple(output),
                        len(prompt) + len(output) - 1,
                        slot,
                        tuple(InstanceTable(k, np.array(p, np.int32), n) for k, (p, n) in tables.items()),
                    )
                    for i, (prompt, output, slot, tables) in enumerate(rows)
                ),
            )
            for master, rows in sub_batches
        ),
        continues=False,
    )


TWO_MASTERS = decode_iteration(
    Group.of((1, 3, 4)),
    [
        (1, [([9, 8], [7], 2, {1: ([0], 3)}), ([1] * 9, [5, 6], 17, {3: ([4, 5, 6], 9), 1: ([4], 2)})]),
        (4, [([2, 3], [], 30, {3: ([7], 1), 4: ([7], 1)})]),
    ],
)

ROWS = DecodeRows.of(TWO_MASTERS, BUCKETS)


def test_a_decodes_tables_list_every_masters_rows_on_every_instance():
    packed = pack_decode(TWO_MASTERS, ROWS, BUCKETS, 4)
    state = packed.state
    assert packed.token_ids.tolist() == [[7, 6, 0, 0], [0] * 4, [3, 0, 0, 0]]
    assert state.positions.tolist() == [[2, 10, 0, 0], [0] * 4, [1, 0, 0, 0]]
    # Four rows a rank, by the master's rank: 1-0 and 1-1 first, 4-0 is row 8. Without this step's own keys.
    found = {
        (int(rank), int(row)): int(state.kv_lens[rank, row]) for rank, row in zip(*state.kv_lens.nonzero(), strict=True)
    }
    assert found == {(0, 0): 2, (0, 1): 1, (1, 1): 9, (1, 8): 1}

    def pages(rank, row, count):
        start = state.page_starts[rank, row]
        return state.page_indices[rank, start : start + count].tolist()

    assert pages(0, 0, 1) == [0]
    assert pages(0, 1, 1) == [4]
    assert pages(1, 1, 3) == [4, 5, 6]
    assert pages(1, 8, 1) == [7]
    assert pages(2, 8, 1) == [7]


def test_growing_rows_have_room_behind_them():
    packed = pack_decode(TWO_MASTERS, ROWS, BUCKETS, 4)
    entries = BUCKETS.num_table_entries
    room = {row: packed.state.page_starts[0, row] for row in (0, 1)}
    slack = packed.num_steps // 4
    assert room[1] - room[0] >= 1 + slack
    assert entries - room[1] >= 1 + slack
    assert slack >= 4


def test_slots_go_to_their_masters_row_and_padding_is_negative():
    assert pack_decode_slots(TWO_MASTERS, ROWS).tolist() == [[2, 17, -1, -1], [-1] * 4, [30, -1, -1, -1]]


def test_an_empty_decode_has_the_shapes_of_a_real_one():
    real = pack_decode(TWO_MASTERS, ROWS, BUCKETS, 4).state
    empty = empty_decode(3, real.positions.shape[1], BUCKETS)
    assert [(leaf.shape, leaf.dtype) for leaf in empty] == [(leaf.shape, leaf.dtype) for leaf in real]


def extend_of(*chunks: tuple[list[int], int, list[int], bool]) -> ExtendIteration:
    """Of each request: new tokens, how many come before them, its pages of 4 tokens, and whether it is sampled."""
    inputs = []
    for i, (token_ids, position, pages, is_sampled) in enumerate(chunks):
        end = position + len(token_ids)
        slots = [pages[j // 4] * 4 + j % 4 for j in range(position, end)]
        inputs.append(
            ExtendInput(
                make_request(f"r{i}", [1] * end),
                np.array(token_ids, np.int32),
                position,
                np.array(slots, np.int32),
                InstanceTable(3, np.array(pages, np.int32), end),
                (),
                is_sampled,
            )
        )
    return ExtendIteration(0, Group((3,)), tuple(inputs))


def test_chunks_are_packed_one_behind_the_other_with_their_tables():
    packed = pack_extend(
        extend_of(([11, 12, 13], 5, [9, 2], True), ([21], 8, [4, 5, 7], False), ([31, 32], 0, [6], True)), BUCKETS
    )
    batch = packed.batch
    assert batch.token_ids[0, :6].tolist() == [11, 12, 13, 21, 31, 32]
    assert batch.positions[0, :6].tolist() == [5, 6, 7, 8, 0, 1]
    assert batch.row_starts[0, :6].tolist() == [0, 0, 0, 3, 4, 4]
    assert batch.slots[0, :6].tolist() == [9, 10, 11, 28, 24, 25]
    assert batch.cu_q_lens[0, :4].tolist() == [0, 3, 4, 6]
    assert batch.kv_lens[0, :3].tolist() == [5, 8, 0]
    assert batch.page_starts[0, :3].tolist() == [0, 2, 5]
    assert batch.page_indices[0, :6].tolist() == [9, 2, 4, 5, 7, 6]


def test_an_extend_samples_the_last_tokens_of_those_it_completes():
    packed = pack_extend(
        extend_of(([11, 12, 13], 5, [9, 2], True), ([21], 8, [4, 5, 7], False), ([31, 32], 0, [6], True)), BUCKETS
    )
    assert packed.sampled == (0, 2)
    assert packed.batch.sample_rows[0].tolist() == [2, 5, -1, -1, -1, -1]
    assert packed.positions.tolist() == [[8, 2, 0, 0]]
    none = pack_extend(extend_of(([21], 8, [4, 5, 7], False)), BUCKETS)
    assert none.sampled == ()
    assert (none.batch.sample_rows == -1).all()


def test_padding_of_an_extend_has_no_keys_and_is_kept_nowhere():
    batch = pack_extend(extend_of(([11, 12], 2, [1], False), ([5], 0, [2], False)), BUCKETS).batch
    assert batch.token_ids.shape == (1, 48)
    assert batch.kv_lens.shape == (1, 4)
    assert (batch.slots[0, 3:] == -1).all()
    assert (batch.row_starts[0, 3:] > np.arange(3, 48)).all()
    assert batch.cu_q_lens[0].tolist() == [0, 2, 3, 3, 3]
    assert batch.kv_lens[0].tolist() == [2, 0, 0, 0]
