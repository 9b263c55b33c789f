"""Pieces of text that never change: their concatenation is what decoding all tokens at once gives."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loongjax.engine.detokenizer import Detokenizer
from tests.engine.tokenizers import FastTokenizer, byte_level, sentencepiece_like

BOTH = pytest.mark.parametrize("tokenizer", [byte_level(), sentencepiece_like()], ids=["byte_level", "sentencepiece"])


def stream(tokenizer: FastTokenizer, token_ids: list[int], prompt: list[int] = [], skip: bool = True) -> list[str]:  # noqa: B006
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip, prompt_token_ids=prompt)
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.finish()]


@settings(max_examples=300)
@given(
    token_ids=st.lists(st.integers(0, byte_level().vocab_size + 20), max_size=60),
    skip=st.booleans(),
)
def test_any_ids_of_a_byte_level_tokenizer_give_the_text_of_all_of_them(token_ids: list[int], skip: bool) -> None:
    tokenizer = byte_level()
    text = "".join(stream(tokenizer, token_ids, skip=skip))
    assert text == tokenizer.decode(token_ids, skip_special_tokens=skip)


@settings(max_examples=300)
@given(
    byte_values=st.lists(
        st.sampled_from([0x61, 0x80, 0xBF, 0xC3, 0xE4, 0xBD, 0xA0, 0xF0, 0x9F, 0x98, 0xFF]), max_size=80
    )
)
def test_any_bytes_give_the_text_of_all_of_them(byte_values: list[int]) -> None:
    tokenizer = byte_level()
    alphabet = _byte_ids(tokenizer)
    token_ids = [alphabet[value] for value in byte_values]
    assert "".join(stream(tokenizer, token_ids)) == bytes(byte_values).decode("utf-8", "replace")


@BOTH
@given(text=st.text(st.sampled_from("the  日本語 é😀 abc"), max_size=40))
def test_any_text_comes_back(tokenizer: FastTokenizer, text: str) -> None:
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = stream(tokenizer, token_ids)
    assert "".join(pieces) == tokenizer.decode(token_ids) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@given(token_ids=st.lists(st.one_of(st.integers(0, 2), st.integers(259, 300)), max_size=30), skip=st.booleans())
def test_any_whole_pieces_of_a_sentencepiece_tokenizer_give_the_text_of_all(token_ids: list[int], skip: bool) -> None:
    tokenizer = sentencepiece_like()
    text = "".join(stream(tokenizer, token_ids, skip=skip))
    assert text == tokenizer.decode(token_ids, skip_special_tokens=skip)


@BOTH
@given(prompt=st.text(st.sampled_from("the 日 "), max_size=12), text=st.text(st.sampled_from("the 日 "), max_size=12))
def test_the_text_continues_the_prompts(tokenizer: FastTokenizer, prompt: str, text: str) -> None:
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.decode([*prompt_ids, *token_ids])
    assert tokenizer.decode(prompt_ids) + "".join(stream(tokenizer, token_ids, prompt_ids)) == whole


def test_a_character_goes_out_when_its_last_byte_comes() -> None:
    tokenizer = byte_level()
    alphabet = _byte_ids(tokenizer)
    pieces = stream(tokenizer, [alphabet[byte] for byte in "a😀b".encode()])
    assert pieces == ["a", "", "", "", "😀", "b", ""]


def test_an_unfinished_character_at_the_end_is_replaced() -> None:
    tokenizer = byte_level()
    alphabet = _byte_ids(tokenizer)
    assert stream(tokenizer, [alphabet[byte] for byte in "é".encode()[:1]]) == ["", "\N{REPLACEMENT CHARACTER}"]


def test_a_character_that_was_whole_stands_even_if_the_tokenizer_takes_it_back() -> None:
    tokenizer = sentencepiece_like()
    token_ids = [3 + byte for byte in "é".encode()] + [3 + 0xE4, 259 + 1]
    assert tokenizer.decode(token_ids).count("\N{REPLACEMENT CHARACTER}") == 3
    assert "".join(stream(tokenizer, token_ids)) == "é\N{REPLACEMENT CHARACTER}a"


@BOTH
@pytest.mark.parametrize("kind", ["text", "special", "unknown", "broken"])
def test_the_cost_of_a_token_does_not_grow_with_the_text(tokenizer: FastTokenizer, kind: str) -> None:
    token_ids = {
        "text": tokenizer.encode("the quick brown fox", add_special_tokens=False),
        "special": [1],
        "unknown": [10_000],
        "broken": [_byte_ids(tokenizer)[0x80]],
    }[kind]
    before = tokenizer.num_decoded
    stream(tokenizer, list(itertools.islice(itertools.cycle(token_ids), 2000)))
    assert tokenizer.num_decoded - before < 100 * 2000


def _byte_ids(tokenizer: FastTokenizer) -> dict[int, int]:
    """Token id of each single byte."""
    if tokenizer is sentencepiece_like():
        return {byte: 3 + byte for byte in range(256)}
    names = {chr(code) for code in [*range(33, 127), *range(161, 173), *range(174, 256)]}
    byte_to_name = {ord(name): name for name in names}
    extra = iter(range(256, 512))
    for byte in range(256):
        if byte not in byte_to_name:
            byte_to_name[byte] = chr(next(extra))
    return {byte: tokenizer.token_id(name) for byte, name in byte_to_name.items()}
