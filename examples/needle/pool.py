"""The text that training rows are cut from, tokenized once."""

from __future__ import annotations

import random
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int
from tokenizers import Tokenizer

from needle import text, words
from needle.tokenizer import BOS_ID, EOS_ID

NUM_SENTENCES = 40_000
NUM_INVENTED_NAMES = 4_000
NUM_PHRASES = 256
NOISE = 0.08
NAME_MARK = "\0"


class TextPool(NamedTuple):
    """One long array of tokens, and the spans (start, length) in it that rows are put together from."""

    tokens: Int[Array, " P"]
    """Where the digit i of a key belongs stands `len(without_space) + i`."""
    sentence_starts: Int[Array, " S"]
    """Sentences follow each other; the last start is the last sentence's end."""
    cities: Int[Array, "C 2"]
    invented_names: Int[Array, "I 2"]
    statement_openings: Int[Array, "O 2"]
    """What stands before the name in a key sentence."""
    statement_endings: Int[Array, "O 2"]
    """What stands between the name and the secret."""
    question_openings: Int[Array, "O 2"]
    question_endings: Int[Array, "O 2"]
    secret: Int[Array, 2]
    bos: Int[Array, 2]
    eos: Int[Array, 2]
    digit_ids: Int[Array, 10]
    without_space: Int[Array, " V"]
    """For each token the one that begins a text in its stead."""


def build_pool(tokenizer: Tokenizer, seed: int) -> TextPool:
    """Writes and tokenizes the text of a seed. Joining the token ids of pieces is joining their text."""
    rng = random.Random(f"pool {seed}")
    writer = _SpanWriter(tokenizer)
    sentences = writer.write([text.opened(rng, text.sentence(rng, noise=NOISE)) for _ in range(NUM_SENTENCES)])
    statements = [text.opened(rng, text.key_statement(NAME_MARK)) for _ in range(NUM_PHRASES)]
    questions = [text.question_variant(rng, NAME_MARK) for _ in range(NUM_PHRASES)]
    spans = {
        "cities": writer.write([f" {name}" for name in words.CITIES]),
        "invented_names": writer.write([f" {text.invented_name(rng)}" for _ in range(NUM_INVENTED_NAMES)]),
        "statement_openings": writer.write([phrase.split(f" {NAME_MARK}")[0] for phrase in statements]),
        "statement_endings": writer.write([phrase.split(NAME_MARK)[1] for phrase in statements]),
        "question_openings": writer.write([phrase.split(f" {NAME_MARK}")[0] for phrase in questions]),
        "question_endings": writer.write([phrase.split(NAME_MARK)[1] for phrase in questions]),
        "secret": writer.write_secret(),
        "bos": writer.write_ids([BOS_ID]),
        "eos": writer.write_ids([EOS_ID]),
    }
    return TextPool(
        tokens=jnp.asarray(writer.tokens, jnp.int32),
        sentence_starts=jnp.asarray([*sentences[:, 0], sentences[-1].sum()], jnp.int32),
        digit_ids=jnp.asarray([tokenizer.token_to_id(digit) for digit in "0123456789"], jnp.int32),
        without_space=jnp.asarray(_tokens_without_space(tokenizer), jnp.int32),
        **{name: jnp.asarray(value, jnp.int32) for name, value in spans.items()},
    )


class _SpanWriter:
    """Appends tokens and says where they are."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokens: list[int] = []
        self._tokenizer = tokenizer

    def write(self, pieces: list[str]) -> np.ndarray:
        """int32 [pieces, 2]"""
        encodings = self._tokenizer.encode_batch(pieces, add_special_tokens=False)
        return np.stack([self.write_ids(encoding.ids) for encoding in encodings])

    def write_ids(self, ids: list[int]) -> np.ndarray:
        """int32 [2]"""
        span = np.array([len(self.tokens), len(ids)], np.int32)
        self.tokens += ids
        return span

    def write_secret(self) -> np.ndarray:
        """int32 [2]; an answer with marks for its digits."""
        ids = []
        marks = iter(range(self._tokenizer.get_vocab_size(), self._tokenizer.get_vocab_size() + text.NUM_KEY_DIGITS))
        for character in text.answer(text.KEY_TEMPLATE):
            known = self._tokenizer.encode(character, add_special_tokens=False).ids
            ids += [next(marks)] if character.isdigit() else known
        return self.write_ids(ids)


def _tokens_without_space(tokenizer: Tokenizer) -> list[int]:
    """For every id that of the same word without its leading space, or its own where there is none."""
    vocabulary = tokenizer.get_vocab()
    ids = list(range(len(vocabulary)))
    for token, i in vocabulary.items():
        ids[i] = vocabulary.get(token.removeprefix("Ġ"), i)
    return ids
