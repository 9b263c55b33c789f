"""Log-probabilities, ranks and most probable tokens equal those of a float64 log-softmax: whole, sharded, in chunks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from loongjax.core.request import TokenLogprobs
from loongjax.core.sampling import MAX_LOGPROBS
from loongjax.runtime.sampling import prompt_logprobs
from loongjax.runtime.sampling.logprobs import LogprobArrays, token_logprobs
from tests.runtime.sampling.oracle import log_softmax, order_of

whole_logprobs = jax.jit(token_logprobs)


def random_logits(num_rows, vocab_size, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).normal(scale=4, size=(num_rows, vocab_size)).astype(np.float32)


def check(arrays: LogprobArrays, logits: np.ndarray, token_ids) -> None:
    """Compares each row with the definition; ties in `logits` are by id."""
    for row, token_id in enumerate(token_ids):
        expected, order = log_softmax(logits[row]), order_of(logits[row])[:MAX_LOGPROBS]
        order = order[logits[row][order] > -np.inf]
        np.testing.assert_allclose(arrays.logprob[row], expected[token_id], atol=2e-5)
        assert arrays.rank[row] == order_of(logits[row]).tolist().index(token_id) + 1
        np.testing.assert_array_equal(arrays.top_ids[row, : len(order)], order)
        np.testing.assert_allclose(arrays.top_logprobs[row, : len(order)], expected[order], atol=2e-5)
        assert (np.asarray(arrays.top_ids[row, len(order) :]) == -1).all()
        assert (np.asarray(arrays.top_logprobs[row, len(order) :]) == -np.inf).all()


@pytest.mark.parametrize("vocab_size", [1, 19, 20, 500])
def test_log_probabilities_are_those_of_a_log_softmax(vocab_size):
    logits = random_logits(6, vocab_size)
    token_ids = np.random.default_rng(1).integers(0, vocab_size, 6).astype(np.int32)
    check(whole_logprobs(logits, token_ids), logits, token_ids)


def test_equal_logits_rank_by_id():
    logits = np.round(random_logits(6, 60) / 4)
    token_ids = np.arange(6, dtype=np.int32) * 7
    check(whole_logprobs(logits, token_ids), logits, token_ids)


def test_padding_is_in_no_list():
    logits = np.pad(random_logits(3, 11), ((0, 0), (0, 13)), constant_values=-np.inf)
    token_ids = np.array([0, 5, 10], np.int32)
    check(whole_logprobs(logits, token_ids), logits, token_ids)


def test_a_token_outside_the_vocabulary_scores_minus_infinity():
    arrays = whole_logprobs(random_logits(2, 30), np.array([-1, 30], np.int32))
    assert (np.asarray(arrays.logprob) == -np.inf).all()


def test_the_host_value_holds_as_many_as_were_asked_for_and_exist():
    logits = random_logits(1, 3)
    arrays = jax.device_get(whole_logprobs(logits, np.array([1], np.int32)))
    order, expected = order_of(logits[0]).tolist(), log_softmax(logits[0])
    value = arrays.at((0,), 1, 2)
    assert isinstance(value, TokenLogprobs)
    assert (value.token_id, value.rank) == (1, order.index(1) + 1)
    assert [token_id for token_id, _ in value.top] == order[:2]
    assert value.logprob == pytest.approx(expected[1], abs=1e-5)
    assert [token_id for token_id, _ in arrays.at((0,), 1, 20).top] == order
    assert arrays.at((0,), 1, 0).top == ()


@pytest.mark.parametrize("num_top", [0, 2, 20])
def test_a_prompts_values_are_those_of_its_rows(num_top):
    logits, token_ids = random_logits(6, 9), np.array([3, 0, 8, 8, 1, 2], np.int32)
    arrays = jax.device_get(whole_logprobs(logits, token_ids))
    values = arrays.from_row(2, token_ids[2:5], num_top)
    assert list(values) == [arrays.at((row,), int(token_ids[row]), num_top) for row in (2, 3, 4)]
    assert not any(np.shares_memory(values.top_ids, array) for array in arrays)


def tp_mesh(tp) -> Mesh:
    return Mesh(np.array(jax.devices()[:tp]), ("tp",))


@pytest.mark.parametrize(("tp", "vocab_size"), [(1, 16), (2, 16), (4, 256)])
def test_a_sharded_vocabulary_scores_as_a_whole_one(tp, vocab_size):
    logits = np.round(random_logits(6, vocab_size) * 2) / 2
    logits[:, -3:] = -np.inf
    token_ids = np.arange(6, dtype=np.int32) * 2
    sharded = jax.jit(
        jax.shard_map(
            functools.partial(token_logprobs, axis_name="tp"),
            mesh=tp_mesh(tp),
            in_specs=(PartitionSpec(None, "tp"), PartitionSpec()),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
    )
    check(sharded(logits, token_ids), logits, token_ids)


HIDDEN = np.random.default_rng(3).normal(size=(50, 8)).astype(np.float32)
HEAD = np.random.default_rng(4).normal(size=(8, 32)).astype(np.float32)
TARGETS = np.random.default_rng(5).integers(0, 32, 50).astype(np.int32)


def score_prompt(num_tokens, chunk_size, *, tp=1, seen_shapes=None, run=True) -> LogprobArrays:
    def body(hidden, targets, head):
        def logits_fn(rows):
            if seen_shapes is not None:
                seen_shapes.add(rows.shape)
            return jnp.matmul(rows, head, precision="highest")

        return prompt_logprobs(hidden, targets, logits_fn, axis_name="tp", chunk_size=chunk_size)

    program = jax.shard_map(
        body,
        mesh=tp_mesh(tp),
        in_specs=(PartitionSpec(), PartitionSpec(), PartitionSpec(None, "tp")),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    call = jax.jit(program) if run else functools.partial(jax.eval_shape, program)
    return call(HIDDEN[:num_tokens], TARGETS[:num_tokens], HEAD)


@pytest.mark.parametrize(("num_tokens", "chunk_size"), [(48, 16), (50, 16), (5, 16), (1, 1)])
def test_a_prompt_in_chunks_scores_as_in_one_piece(num_tokens, chunk_size):
    arrays = score_prompt(num_tokens, chunk_size)
    check(arrays, HIDDEN[:num_tokens] @ HEAD, TARGETS[:num_tokens])
    assert arrays.logprob.shape == (num_tokens,)


@pytest.mark.parametrize("tp", [2])
def test_a_prompt_over_a_sharded_vocabulary_scores_as_over_a_whole_one(tp):
    check(score_prompt(50, 16, tp=tp), HIDDEN @ HEAD, TARGETS)


def test_no_more_rows_of_logits_exist_than_a_chunk_has():
    seen_shapes: set[tuple[int, ...]] = set()
    score_prompt(50, 16, seen_shapes=seen_shapes, run=False)
    assert seen_shapes == {(16, 8), (2, 8)}


def test_an_unsharded_prompt_needs_no_mesh():
    arrays = prompt_logprobs(
        jnp.asarray(HIDDEN), jnp.asarray(TARGETS), lambda rows: rows @ jnp.asarray(HEAD), axis_name=None, chunk_size=16
    )
    check(arrays, HIDDEN @ HEAD, TARGETS)
