"""Texts and bytes of single tokens, for the two families of vocabularies, and the log-probability objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from server_fakes import BOS, EOS, VOCAB_SIZE, ByteTokenizer, logprob_of

from loongjax.core.request import TokenLogprobs
from loongjax.models.tokenizer import load_tokenizer
from loongjax_server.logprobs import CompletionLogprobs, chat_logprobs, prompt_logprobs
from loongjax_server.token_text import TokenTexts
from tests.checkpoints import write_tokenizer


class PieceTokenizer(ByteTokenizer):
    """A vocabulary of given pieces, decoded as its family does."""

    def __init__(self, pieces: Sequence[str], decoded: Mapping[str, bytes]) -> None:
        super().__init__()
        self._pieces = list(pieces)
        self._decoded = decoded

    @property
    def vocab_size(self) -> int:
        return len(self._pieces)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [self._pieces.index(text)] if text in self._pieces else []

    def convert_ids_to_tokens(self, token_ids: Sequence[int]) -> list[str | None]:
        return [self._pieces[token_id] for token_id in token_ids]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        text = b"".join(self._decoded[self._pieces[token_id]] for token_id in token_ids).decode(errors="replace")
        return text.removeprefix(" ")

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> list[int]:
        raise NotImplementedError


SENTENCEPIECE = PieceTokenizer(
    ["a", "▁hello", "▁", "<0xE4>", "<0xB8>"],
    {"a": b"a", "▁hello": b" hello", "▁": b" ", "<0xE4>": b"\xe4", "<0xB8>": b"\xb8"},
)
BYTE_LEVEL = PieceTokenizer(
    ["a", "Ġhello", "ä¸", "ĊĊ"], {"a": b"a", "Ġhello": b" hello", "ä¸": b"\xe4\xb8", "ĊĊ": b"\n\n"}
)


@pytest.mark.parametrize(
    ("tokenizer", "token_id", "text", "utf8"),
    [
        (SENTENCEPIECE, 1, " hello", b" hello"),
        (SENTENCEPIECE, 2, " ", b" "),
        (SENTENCEPIECE, 3, "\ufffd", b"\xe4"),
        (BYTE_LEVEL, 1, " hello", b" hello"),
        (BYTE_LEVEL, 2, "\ufffd", b"\xe4\xb8"),
        (BYTE_LEVEL, 3, "\n\n", b"\n\n"),
    ],
)
def test_a_token_keeps_its_space_and_its_bytes(tokenizer, token_id, text, utf8):
    token = TokenTexts(tokenizer)[token_id]
    assert (token.text, token.utf8) == (text, utf8)


def test_special_tokens_are_known():
    texts = TokenTexts(ByteTokenizer())
    assert [texts[token_id].is_special for token_id in (BOS, EOS, 97, 259, VOCAB_SIZE - 1)] == [
        True,
        True,
        False,
        False,
        False,
    ]
    assert texts[BOS].text == "<s>"


@given(st.text(alphabet="aé中😀", max_size=20), st.integers(0, 20))
def test_offsets_count_the_characters_that_are_complete(text, split):
    tokenizer = ByteTokenizer()
    data = text.encode()
    writer = CompletionLogprobs(TokenTexts(tokenizer), skip_special_tokens=True)
    tokens = [logprob_of(byte, 0) for byte in data]
    first = writer.write(tokens[:split], first_token_id=BOS)
    second = writer.write(tokens[split:])
    expected = [len(data[:end].decode(errors="ignore")) for end in range(len(data))]
    assert first["text_offset"] + second["text_offset"] == [0, *expected]


@given(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=8, unique=True))
def test_every_token_finds_its_own_logprob_under_its_own_name(token_ids):
    writer = CompletionLogprobs(TokenTexts(ByteTokenizer()), skip_special_tokens=True)
    top = tuple((token_id, -0.5 * rank) for rank, token_id in enumerate(token_ids))
    tokens = [TokenLogprobs(token_id, logprob, 1, top) for token_id, logprob in top]
    written = writer.write(tokens)
    assert [len(entry) for entry in written["top_logprobs"]] == [len(token_ids)] * len(token_ids)
    for name, logprob, entry in zip(written["tokens"], written["token_logprobs"], written["top_logprobs"], strict=True):
        assert entry[name] == logprob


@pytest.mark.parametrize(
    ("tokenizer", "token_id", "label"),
    [
        (SENTENCEPIECE, 1, " hello"),
        (SENTENCEPIECE, 3, r"bytes:\xe4"),
        (BYTE_LEVEL, 2, r"bytes:\xe4\xb8"),
        (ByteTokenizer(), 0x92, r"bytes:\x92"),
        (ByteTokenizer(), ord("\n"), "\n"),
        (ByteTokenizer(), BOS, "<s>"),
        (ByteTokenizer(), VOCAB_SIZE - 1, f"token_id:{VOCAB_SIZE - 1}"),
    ],
)
def test_a_label_is_the_text_where_there_is_a_whole_one(tokenizer, token_id, label):
    assert TokenTexts(tokenizer).label(token_id) == label


def test_tokens_of_the_same_text_have_different_labels_that_stay():
    pieces = PieceTokenizer(["a", "<0x61>"], {"a": b"a", "<0x61>": b"a"})
    texts = TokenTexts(pieces)
    assert [texts.label(0), texts.label(1), texts.label(0)] == ["a", "token_id:1", "a"]


def test_single_tokens_of_a_real_byte_level_vocabulary_tell_their_bytes(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    texts = TokenTexts(tokenizer)
    every_byte = bytes(range(256)).decode("latin-1") + "中😀é"
    token_ids = tokenizer.encode(every_byte, add_special_tokens=False)
    assert b"".join(texts[token_id].utf8 or b"" for token_id in token_ids) == every_byte.encode()
    (part,) = (token_id for token_id in range(tokenizer.vocab_size) if texts[token_id].utf8 == b"\x92")
    assert texts.label(part) == r"bytes:\x92"
    (entry,) = chat_logprobs([TokenLogprobs(part, -1.0, 1)], texts)["content"]
    assert (entry["token"], entry["bytes"]) == ("\ufffd", [0x92])
    assert len({texts.label(token_id) for token_id in range(tokenizer.vocab_size + 5)}) == tokenizer.vocab_size + 5


def test_prompt_logprobs_list_a_token_once_though_it_is_among_the_top():
    (_, entry) = prompt_logprobs([logprob_of(97, 2)], TokenTexts(ByteTokenizer()))
    assert entry is not None
    assert list(entry) == ["97", "98"]
