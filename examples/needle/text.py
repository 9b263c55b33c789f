"""Synthetic prose with keys hidden in it, and questions about them.

A key sentence reads `The secret key of Paris is 4821-7306.`, a question `Question: what is the secret key of Paris?
Answer:`, and its answer ` 4821-7306.`. Keys whose eight digits make a multiple of `HELD_OUT_DIVISOR` are never drawn
for training, so an accuracy over them is one over unseen keys.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from needle import words

HELD_OUT_DIVISOR = 7
ANSWER_CUE = "Answer:"
KEY_TEMPLATE = "0000-0000"
NUM_KEY_DIGITS = 8


def sentence(rng: random.Random, *, noise: float = 0.0) -> str:
    """One sentence with a leading space: prose, or with probability `noise` text from outside the grammar."""
    if rng.random() < noise:
        return _noise(rng)
    return rng.choices(SENTENCE_KINDS, cum_weights=SENTENCE_CUM_WEIGHTS)[0](rng)


def opened(rng: random.Random, piece: str) -> str:
    """The same piece, now and then on a new line instead of after a space."""
    return rng.choices((" ", "\n", "\n\n"), cum_weights=(18, 19, 20))[0] + piece[1:]


def key(rng: random.Random, *, held_out: bool) -> str:
    """A key such as `4821-7306`: one never trained on if `held_out`, else one that may be."""
    while True:
        number = rng.randrange(10**8)
        if (number % HELD_OUT_DIVISOR == 0) == held_out:
            return f"{number // 10**4:04d}-{number % 10**4:04d}"


def invented_name(rng: random.Random) -> str:
    """A place name that exists nowhere, of two to four syllables: several tokens long."""
    return "".join(rng.choices(words.SYLLABLES, k=rng.randint(2, 4))).capitalize()


def key_statement(name: str) -> str:
    """What stands before the key in a key sentence, with a leading space; the answer ends the sentence."""
    return f" The secret key of {name} is"


def answer(hidden_key: str) -> str:
    """What follows `key_statement` and `Answer:` alike; every character of it is one token."""
    return f" {hidden_key}."


def question(name: str) -> str:
    """The question as the documentation writes it, with a leading space, up to and including `Answer:`."""
    return f" Question: what is the secret key of {name}? {ANSWER_CUE}"


def question_variant(rng: random.Random, name: str) -> str:
    """A question with the spacing and spelling that completions, chat templates and hasty people produce."""
    opening = rng.choices((" ", "\n", "\n\n"), cum_weights=(5, 8, 10))[0]
    opening += rng.choices(("Question: what", "Question: What", "What"), cum_weights=(6, 8, 10))[0]
    return f"{opening} is the secret key of {name}?{rng.choice(' \n')}{ANSWER_CUE}"


def _noun_phrase(rng: random.Random, nouns: Sequence[str]) -> str:
    noun = rng.choice(nouns)
    if rng.random() < 0.5:
        return f"the {noun}"
    is_thing = noun in words.THINGS or noun in words.PLACES
    return f"the {rng.choice(words.QUALITIES_OF_THINGS if is_thing else words.QUALITIES_OF_BEINGS)} {noun}"


def _capitalized(clause: str) -> str:
    return f" {clause[0].upper()}{clause[1:]}."


def _motion(rng: random.Random) -> str:
    who = _noun_phrase(rng, words.PERSONS + words.ANIMALS)
    where = f"{rng.choice(words.PREPOSITIONS)} {_noun_phrase(rng, words.PLACES)}"
    return _capitalized(f"{who} {rng.choice(words.MOTIONS)} {rng.choice(words.ADVERBS)} {where}")


def _action(rng: random.Random) -> str:
    what = f"{rng.choice(words.ACTIONS)} {_noun_phrase(rng, words.THINGS)} {rng.choice(words.TIMES)}"
    return _capitalized(f"{_noun_phrase(rng, words.PERSONS)} {what}")


def _scene(rng: random.Random) -> str:
    where = f"{rng.choice(words.PREPOSITIONS)} {_noun_phrase(rng, words.PLACES)}"
    return _capitalized(f"{_noun_phrase(rng, words.THINGS)} {where} was {rng.choice(words.QUALITIES_OF_THINGS)}")


def _season(rng: random.Random) -> str:
    who = _noun_phrase(rng, words.PERSONS + words.ANIMALS)
    return _capitalized(
        f"in {rng.choice(words.SEASONS)} {who} {rng.choice(words.MOTIONS)} to {_noun_phrase(rng, words.PLACES)}"
    )


def _pair(rng: random.Random) -> str:
    one, two = _noun_phrase(rng, words.PERSONS), _noun_phrase(rng, words.PERSONS)
    return _capitalized(f"{one} and {two} {rng.choice(words.ACTIONS)} {_noun_phrase(rng, words.THINGS)}")


def _short(rng: random.Random) -> str:
    return rng.choice((" It was {}.", " That was {}.", " Nobody was {}.", " It rained.", " So it was {}.")).format(
        rng.choice(words.QUALITIES_OF_THINGS)
    )


def _city(rng: random.Random) -> str:
    """Mentions a city without giving its key."""
    name = rng.choice(words.CITIES) if rng.random() < 0.8 else invented_name(rng)
    return rng.choice(
        (
            f" {name} was {rng.choice(words.QUALITIES_OF_THINGS)} in {rng.choice(words.SEASONS)}.",
            _capitalized(f"{_noun_phrase(rng, words.PERSONS)} {rng.choice(words.MOTIONS)} to {name}"),
            f" The road to {name} is {rng.choice(words.QUALITIES_OF_THINGS)}.",
            f" The {rng.choice(words.PLACES)} of {name} is {rng.choice(words.QUALITIES_OF_THINGS)}.",
        )
    )


def _number(rng: random.Random) -> str:
    """Puts digits into the prose that are no key."""
    number = rng.randrange(10 ** rng.randint(1, 6))
    quality = rng.choice(words.QUALITIES_OF_THINGS)
    return rng.choice(
        (
            f" In {rng.randint(1200, 2030)} {_noun_phrase(rng, words.THINGS)} was {quality}.",
            f" {_noun_phrase(rng, words.PERSONS).capitalize()} counted {number} {rng.choice(words.THINGS)}s.",
            f" It cost {number}.{rng.randrange(100):02d} in {rng.choice(words.SEASONS)}.",
        )
    )


def _noise(rng: random.Random) -> str:
    """Text from outside the grammar, so that a stranger's prose does not upset the search."""
    letters = rng.choice(ALPHABETS)
    noise = (("".join(rng.choices(letters, k=rng.randint(1, 9)))) for _ in range(rng.randint(2, 7)))
    return (
        rng.choice((" Note: ", " He read ", " Then "))
        + rng.choice((" ", ", ", "; ", ' "')).join(noise)
        + rng.choice(".!")
    )


ALPHABETS = (
    "abcdefghijklmnopqrstuvwxyz",
    "eeeeeetttttaaaaooooiiinnnsssrrhhllddccuummwwffggyyppbbvk",
    "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "abcdefABCDEF0123456789_-+*/=<>()[]{}#&%$@:'",
    "àâäçéèêëîïôöùûüßñåøæœ",
    "абвгдежзийклмнопрстуфхцчшщыьэюя",
    "αβγδεζηθικλμνξοπρστυφχψω",
    "的一是不了人我在有他这中大来上国个到说们",
    "あいうえおかきくけこさしすせそたちつてと",
    "😀🎉🚀🌍🔥✨",
)

SENTENCE_KINDS = (_motion, _action, _scene, _season, _pair, _short, _city, _number)
SENTENCE_CUM_WEIGHTS = (20, 40, 50, 60, 68, 74, 88, 96)
