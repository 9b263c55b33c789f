"""Over meshes: the same tokens on every rank and mesh, counts updated in place, one executable a variant."""

import functools

import jax
import numpy as np
import pytest

from loongjax.core.cluster import Group
from loongjax.parallel.mesh import DeviceGrid
from loongjax.runtime.recompiles import RecompileCounter
from loongjax.runtime.sampling import TIERS, SamplerInput, SamplerVariant, build_counts, build_rows, sample_step
from loongjax.runtime.sampling.counts import HISTORY_CAPACITIES, token_histories
from tests.runtime.sampling.oracle import log_softmax, make_input, plausible_tokens, position_of

VOCAB = 24
GREEDY, SAMPLED, FILTERED, SCORED, FULL = TIERS


def mesh_of(sp, tp):
    return DeviceGrid(jax.devices(), tp=tp).mesh(Group.of(range(sp)))


def step(sub_batches, logits_of, *, batch_size, tp=1, variant: SamplerVariant = FULL, counts=None, run=True):
    """One step of a batch: the logits of each request by its id."""
    sp = len(sub_batches)
    _, rows = build_rows(sub_batches, batch_size, variant)
    logits = np.zeros((sp, batch_size, VOCAB), np.float32)
    positions = np.zeros((sp, batch_size), np.int32)
    for rank, inputs in enumerate(sub_batches):
        for row, item in enumerate(inputs):
            logits[rank, row] = logits_of[item.request.request_id]
            positions[rank, row] = position_of(item)
    with jax.set_mesh(mesh_of(sp, tp)):
        if variant.has_penalties and counts is None:
            counts = build_counts(sub_batches, batch_size, VOCAB)
        program = functools.partial(sample_step, variant)
        return program(logits, positions, rows, counts) if run else jax.eval_shape(program, logits, positions, rows)


@pytest.fixture(scope="module")
def logits_of():
    rng = np.random.default_rng(0)
    return {str(i): rng.normal(size=VOCAB).astype(np.float32) for i in range(4)}


@pytest.fixture(scope="module")
def inputs():
    params = (
        {"temperature": 0.0, "presence_penalty": 1.0, "output": (2, 2, 9)},
        {"temperature": 1.2, "top_p": 0.9, "logprobs": 3},
        {"temperature": 0.8, "top_k": 12, "repetition_penalty": 1.4, "output": (4,)},
        {"temperature": 2.0, "min_tokens": 4, "stop_ids": (0, 5), "logit_bias": {7: 2.0}},
    )
    return [make_input(request_id=str(i), seed=i - 2, **kwargs) for i, kwargs in enumerate(params)]


def tokens_by_request(result, sub_batches):
    token_ids = np.asarray(result.token_ids)
    return {
        item.request.request_id: int(token_ids[rank, row])
        for rank, inputs in enumerate(sub_batches)
        for row, item in enumerate(inputs)
    }


@pytest.mark.parametrize(
    ("places", "batch_size", "tp"),
    [
        (((3, 1), (2, 0)), 2, 1),
        (((2, 0, 1, 3),), 4, 2),
        (((), (0, 3, 2), (), (1,)), 8, 2),
        (((1, 2), (3, 0)), 4, 4),
        (((3,), (), (), (), (0, 1), (), (2,), ()), 2, 1),
    ],
)
def test_a_request_samples_alike_on_every_rank_of_every_mesh(inputs, logits_of, places, batch_size, tp):
    sub_batches = [[inputs[i] for i in rank] for rank in places]
    result = step(sub_batches, logits_of, batch_size=batch_size, tp=tp)
    for rank, row_inputs in enumerate(sub_batches):
        for row, item in enumerate(row_inputs):
            logits = logits_of[item.request.request_id]
            token = int(result.token_ids[rank, row])
            assert plausible_tokens(logits, item) == {token}
            np.testing.assert_allclose(result.logprobs.logprob[rank, row], log_softmax(logits)[token], atol=1e-5)


def test_every_tp_rank_holds_the_same_result(inputs, logits_of):
    result = step([inputs[1:3], [inputs[3], inputs[0]]], logits_of, batch_size=4, tp=4)
    for leaf in jax.tree.leaves(result):
        shards: dict[str, np.ndarray] = {}
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, shards.setdefault(str(shard.index), np.asarray(shard.data)))
        assert len(shards) == 2


def test_counts_are_donated_and_updated_in_place(inputs, logits_of):
    with jax.set_mesh(mesh_of(2, 1)):
        counts = build_counts([inputs[:2], inputs[2:]], 2, VOCAB)
    before = [shard.data.unsafe_buffer_pointer() for leaf in counts for shard in leaf.addressable_shards]
    result = step([inputs[:2], inputs[2:]], logits_of, batch_size=2, counts=counts)
    after = [shard.data.unsafe_buffer_pointer() for leaf in result.counts for shard in leaf.addressable_shards]
    assert all(leaf.is_deleted() for leaf in counts)
    assert before == after


def test_counts_on_the_devices_follow_the_history_over_steps(inputs, logits_of):
    sub_batches, counts = [inputs[:2], inputs[2:]], None
    for _ in range(3):
        result = step(sub_batches, logits_of, batch_size=2, counts=counts)
        drawn, counts = tokens_by_request(result, sub_batches), result.counts
        sub_batches = [
            [SamplerInput(item.request, (*item.output_token_ids, drawn[item.request.request_id])) for item in rank]
            for rank in sub_batches
        ]
    for rank, row_inputs in enumerate(sub_batches):
        for row, item in enumerate(row_inputs):
            if item.request.sampling.has_penalties:
                assert counts is not None
                expected = np.bincount(item.output_token_ids, minlength=VOCAB)
                np.testing.assert_array_equal(counts.output[rank, row], expected)


def test_variants_without_logprobs_and_penalties_return_tokens_alone(inputs, logits_of):
    for variant in (GREEDY, SAMPLED, FILTERED):
        result = step([inputs[:1]], logits_of, batch_size=1, variant=variant, run=False)
        assert result.logprobs is None
        assert result.counts is None


def test_other_requests_in_the_same_bucket_compile_nothing(inputs, logits_of):
    step([inputs[:2], inputs[2:]], logits_of, batch_size=2)
    counter = RecompileCounter()
    try:
        step([inputs[2:], []], logits_of, batch_size=2)
        step(
            [[make_input(request_id="1", logit_bias=dict.fromkeys(range(20), 1.0))], []],
            logits_of,
            batch_size=2,
            variant=FULL,
        )
        assert counter.count == 0
    finally:
        counter.close()


def test_histories_leave_out_what_nothing_penalises():
    inputs = [
        make_input(prompt=(1, 2), output=(3,)),
        make_input(prompt=(4, 5), output=(6,), presence_penalty=1.0),
        make_input(prompt=(7, 8), output=(9,), repetition_penalty=2.0),
    ]
    (history,) = token_histories([inputs], 4)
    entries = zip(*(column[0].tolist() for column in history), strict=True)
    assert {entry for entry in entries if entry[0] < 4} == {(1, 6, True), (2, 9, True), (2, 7, False), (2, 8, False)}
    assert history.row.shape == (1, HISTORY_CAPACITIES[0])


@pytest.mark.parametrize(("length", "shapes"), [(0, [4096]), (4095, [4096]), (4096, [65536]), (70_000, [65536] * 2)])
def test_histories_of_any_length_come_in_two_sizes(length, shapes):
    item = make_input(prompt=(0,), output=(3,) * length, repetition_penalty=2.0)
    histories = token_histories([[item], []], 1)
    assert [history.row.shape[1] for history in histories] == shapes
    assert sum(int((history.row == 0).sum()) for history in histories) == length + 1


def test_a_prompt_names_each_of_its_tokens_once_and_an_output_every_time():
    item = make_input(prompt=(5, 2, 5, 5, 2), output=(5, 5, 7), repetition_penalty=2.0)
    (history,) = token_histories([[item]], 1)
    entries = [entry[1:] for entry in zip(*(column[0].tolist() for column in history), strict=True) if entry[0] == 0]
    assert sorted(entries) == [(2, False), (5, False), (5, True), (5, True), (7, True)]


def test_counts_of_a_long_history_equal_a_bincount():
    prompt = np.random.default_rng(1).integers(0, VOCAB - 1, 70_000).tolist()
    item = make_input(prompt=prompt[:30_000], output=prompt, repetition_penalty=2.0)
    with jax.set_mesh(mesh_of(1, 1)):
        counts = build_counts([[item]], 1, VOCAB)
    np.testing.assert_array_equal(counts.output[0, 0], np.bincount(prompt, minlength=VOCAB))
    np.testing.assert_array_equal(counts.in_prompt[0, 0], np.isin(np.arange(VOCAB), prompt[:30_000]))
