"""Training rows: what they say, what is marked as an answer, and which positions they claim."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from needle import text
from needle.pool import TextPool, build_pool
from needle.rows import ANSWER, PAD, PROSE, draw_numbers, make_batch
from needle.tokenizer import BOS_ID, EOS_ID, train_tokenizer

TOKENIZER = train_tokenizer(0)
LONGEST = 4096
STATEMENT = re.compile(r"The secret key of (\w+) is (\d{4}-\d{4})\.")
ASKED = re.compile(r"is the secret key of (\w+)\?\sAnswer: (\d{4}-\d{4})\.</s>")


@pytest.fixture(scope="module")
def pool() -> TextPool:
    return build_pool(TOKENIZER, seed=0)


@pytest.fixture(scope="module")
def rows(pool) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(tokens, kinds, positions) of many rows of 384 tokens."""
    batches = [make_batch(pool, 0, step, 16, 384, LONGEST) for step in range(6)]
    return [row for batch in batches for row in zip(*map(np.asarray, batch), strict=True)]


def decode(tokens: np.ndarray) -> str:
    return TOKENIZER.decode(tokens.tolist(), skip_special_tokens=False)


def test_every_answer_is_the_key_that_was_told_before(rows):
    num_answers = 0
    for tokens, _, _ in rows:
        written = decode(tokens)
        told = dict(STATEMENT.findall(written))
        for match in ASKED.finditer(written):
            assert told[match.group(1)] == match.group(2)
            assert written.index(f"key of {match.group(1)} is") < match.start()
            num_answers += 1
    assert num_answers > 2 * len(rows)


def test_no_name_is_told_two_keys_in_one_row(rows):
    for tokens, _, _ in rows:
        names = [name for name, _ in STATEMENT.findall(decode(tokens))]
        assert len(set(names)) == len(names)


def test_answers_are_what_follows_the_cue_with_eos(rows):
    for tokens, kinds, _ in rows:
        answers = decode(tokens[kinds == ANSWER])
        assert re.fullmatch(r"( \d{4}-\d{4}\.</s>)*( [\d.-]*)?", answers)
        whole = [secret for _, secret in ASKED.findall(decode(tokens))]
        assert re.findall(r"(\d{4}-\d{4})\.</s>", answers) == whole


def test_joined_pieces_are_tokenized_as_the_text_is(rows):
    for tokens, kinds, _ in rows:
        written = tokens[kinds != PAD]
        assert TOKENIZER.encode(decode(written), add_special_tokens=False).ids == written.tolist()


def test_most_rows_begin_with_bos_and_none_has_another(rows):
    begins = np.array([tokens[0] == BOS_ID for tokens, _, _ in rows])
    assert 0.85 < begins.mean() < 1.0
    assert not any((tokens[1:] == BOS_ID).any() for tokens, _, _ in rows)


def test_padding_is_at_the_end_and_short(rows):
    for tokens, kinds, _ in rows:
        is_padding = kinds == PAD
        assert (tokens[is_padding] == EOS_ID).all()
        assert not (np.diff(is_padding.astype(int)) < 0).any()
    assert np.mean([(kinds == PAD).mean() for _, kinds, _ in rows]) < 0.2
    assert np.mean([(kinds == PROSE).mean() for _, kinds, _ in rows]) > 0.5


def test_positions_rise_below_the_limit_and_never_jump_inside_an_answer(rows):
    has_jumps = []
    for _, kinds, positions in rows:
        steps = np.diff(positions)
        assert (steps >= 1).all()
        assert positions[-1] <= LONGEST
        inside = (kinds[1:] == ANSWER) & (kinds[:-1] == ANSWER) & (np.roll(kinds, -1)[1:] == ANSWER)
        inside &= np.arange(len(inside)) < len(inside) - 1
        has_jumps.append((steps > 1).any())
        assert (steps[inside] == 1).mean() > 0.9 if inside.any() else True
    assert 0.25 < np.mean(has_jumps) < 0.75


def test_a_step_is_the_same_again_and_other_steps_differ(pool):
    first, again, other = (make_batch(pool, 0, step, 4, 128, LONGEST) for step in (1, 1, 2))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, first, again))
    assert not jnp.array_equal(first.tokens, other.tokens)


def test_keys_are_never_those_for_measuring():
    numbers = np.asarray(draw_numbers(jax.random.key(0), 50_000))
    assert (numbers % text.HELD_OUT_DIVISOR != 0).all()
    assert numbers.min() >= 0
    assert numbers.max() < 10**text.NUM_KEY_DIGITS
    counts = np.bincount(numbers // 10 ** (text.NUM_KEY_DIGITS - 1), minlength=10)
    assert counts.min() > 0.9 * len(numbers) / 10
