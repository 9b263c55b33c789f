"""The synthetic text and the prompts made of it."""

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from needle import text, words
from needle.prompts import PromptWriter
from needle.tokenizer import train_tokenizer

TOKENIZER = train_tokenizer(0)
SECRET = re.compile(r"\d{4}-\d{4}")
seeds = st.integers(0, 2**32)


@pytest.fixture(scope="module")
def writer() -> PromptWriter:
    return PromptWriter(TOKENIZER, seed=5)


@given(seeds)
def test_no_key_for_training_is_one_for_measuring(seed):
    rng = random.Random(seed)
    training, measuring = text.key(rng, held_out=False), text.key(rng, held_out=True)
    assert int(training.replace("-", "")) % text.HELD_OUT_DIVISOR != 0
    assert int(measuring.replace("-", "")) % text.HELD_OUT_DIVISOR == 0
    assert SECRET.fullmatch(training)
    assert SECRET.fullmatch(measuring)


@given(seeds, st.sampled_from([0.0, 1.0]))
def test_a_sentence_begins_with_a_space_and_ends_with_a_stop(seed, noise):
    sentence = text.sentence(random.Random(seed), noise=noise)
    assert re.fullmatch(r" \S.*[.!?]", sentence)


@given(seeds)
def test_every_question_asks_for_the_name_and_ends_with_the_cue(seed):
    question = text.question_variant(random.Random(seed), "Paris")
    assert re.search(
        r"\bhat is the secret key of Paris\?\sAnswer:$", question.replace("What", "hat").replace("what", "hat")
    )


def test_the_documented_question_reads_as_documented():
    assert text.question("Paris") == " Question: what is the secret key of Paris? Answer:"
    assert text.key_statement("Paris") + text.answer("4821-7306") == " The secret key of Paris is 4821-7306."


def test_no_city_is_listed_twice():
    assert len(set(words.CITIES)) == len(words.CITIES)


@pytest.mark.parametrize("length", [64, 65, 100, 512, 2000, 8192])
@pytest.mark.parametrize("depth", [0.0, 0.37, 1.0])
def test_a_prompt_is_as_long_as_asked_and_never_longer(writer, length, depth):
    for example in writer.examples(length, depth, 4):
        num_tokens = len(TOKENIZER.encode(example.prompt).ids)
        assert length - 16 <= num_tokens <= length


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_the_key_stands_at_its_depth(writer, depth):
    for example in writer.examples(4096, depth, 8):
        assert example.prompt.index(example.answer) / len(example.prompt) == pytest.approx(depth, abs=0.03)


def test_depths_zero_and_one_are_the_very_ends(writer):
    for example in writer.examples(256, 0.0, 8):
        assert SECRET.findall(example.prompt)[0] in example.answer
    for example in writer.examples(256, 1.0, 8):
        assert SECRET.findall(example.prompt)[-1] in example.answer


@pytest.mark.parametrize("length", [64, 1024])
def test_a_prompt_has_one_right_answer_among_keys_of_other_names(writer, length):
    for example in writer.examples(length, 0.5, 12):
        [name] = re.findall(r"key of (\w+)\? Answer:$", example.prompt)
        told = dict(re.findall(r"The secret key of (\w+) is (\d{4}-\d{4})\.", example.prompt))
        assert example.answer == f" {told[name]}."
        assert len(told) == 1 + min(8, length // 64)
        assert example.prompt.count(f"key of {name} is") == 1


def test_the_same_seed_writes_the_same_prompts(writer):
    again = PromptWriter(TOKENIZER, seed=5)
    assert again.examples(200, 0.5, 3) == writer.examples(200, 0.5, 3)
    assert again.examples(200, 0.5, 3) != again.examples(200, 0.6, 3)


def test_a_prompt_too_short_for_a_question_is_refused(writer):
    with pytest.raises(ValueError, match="expected at least 64"):
        writer.examples(63, 0.5, 1)
