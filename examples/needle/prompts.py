"""Prompts of a wanted length with an unseen key at a wanted depth, and their answers."""

from __future__ import annotations

import dataclasses
import functools
import random

from tokenizers import Tokenizer

from needle import text, words

MIN_PROMPT_TOKENS = 64
MAX_OTHER_KEYS = 8
DEPTHS = tuple(i / 10 for i in range(11))
BOS_AND_SPACE_TOKENS = 2
"""BOS, and what the first piece may grow by when it loses its leading space."""
NUM_SENTENCES = 10_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """One prompt and the only right completion of it."""

    prompt: str
    answer: str


class PromptWriter:
    """Writes examples; the same seed and arguments give the same ones."""

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        rng = random.Random(f"prompts {seed}")
        self._seed = seed
        self._sentences = [text.sentence(rng) for _ in range(NUM_SENTENCES)]
        self._num_tokens = functools.cache(lambda piece: len(tokenizer.encode(piece, add_special_tokens=False).ids))

    def examples(self, length: int, depth: float, num_keys: int) -> list[Example]:
        """Examples of one length and depth: every fourth asks for an invented place, the others for real cities."""
        rng = random.Random(f"{self._seed} {length} {depth}")
        names = [text.invented_name(rng) if i % 4 == 3 else rng.choice(words.CITIES) for i in range(num_keys)]
        return [self.example(rng, name=name, length=length, depth=depth) for name in names]

    def spread_examples(self, length: int, num_keys: int) -> list[tuple[float, Example]]:
        """Examples of one length with their depths: `num_keys` spread over `DEPTHS` as evenly as can be."""
        shares = [num_keys // len(DEPTHS) + (i < num_keys % len(DEPTHS)) for i in range(len(DEPTHS))]
        return [
            (depth, example)
            for depth, share in zip(DEPTHS, shares, strict=True)
            for example in self.examples(length, depth, share)
        ]

    def example(self, rng: random.Random, *, name: str, length: int, depth: float) -> Example:
        """A prompt with the unseen key of `name` at `depth`, other keys anywhere, and the question at its end.

        Args:
            length: tokens of the prompt, BOS included: never exceeded, and missed by less than a short sentence.
            depth: how far into the prose the key stands, from 0 (before it) to 1 (after it).

        Raises:
            ValueError: `length` is under `MIN_PROMPT_TOKENS`.
        """
        if length < MIN_PROMPT_TOKENS:
            raise ValueError(f"got {length=}, expected at least {MIN_PROMPT_TOKENS}: two keys and a question need them")
        num_others = min(MAX_OTHER_KEYS, length // MIN_PROMPT_TOKENS)
        others = rng.sample([city for city in words.CITIES if city != name], num_others)
        secret = text.answer(text.key(rng, held_out=True))
        # The middle element breaks ties so that depths 0 and 1 are the very ends, whatever else stands there.
        pieces = [(depth, -1 if depth < 0.5 else 1, text.key_statement(name) + secret)]
        for other in others:
            statement = text.key_statement(other) + text.answer(text.key(rng, held_out=True))
            pieces.append((rng.random(), 0, statement))
        room = length - BOS_AND_SPACE_TOKENS - self._num_tokens(text.question(name))
        room -= sum(self._num_tokens(statement) for *_, statement in pieces)
        prose = self._prose(rng, room)
        pieces += [((i + 0.5) / len(prose), 0, sentence) for i, sentence in enumerate(prose)]
        haystack = "".join(piece for *_, piece in sorted(pieces))
        return Example(prompt=(haystack + text.question(name)).lstrip(), answer=secret)

    def _prose(self, rng: random.Random, room: int) -> list[str]:
        """Sentences of at most `room` tokens together, tried until a few in a row are too long for what is left."""
        prose: list[str] = []
        num_misses = 0
        while num_misses < 20:
            sentence = rng.choice(self._sentences)
            if self._num_tokens(sentence) <= room:
                prose.append(sentence)
                room -= self._num_tokens(sentence)
            else:
                num_misses += 1
        return prose
