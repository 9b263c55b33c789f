"""Token ids to text, one token at a time, never taking anything back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MAX_UNFINISHED = 3
"""A UTF-8 character has at most four bytes, so at most this many can be waiting for the rest of theirs."""
_CONTEXT_TOKENS = 6
"""Tokens of the prompt that may shape the first piece of text: a character's bytes, and the word before."""
_MIN_SPLIT_TOKENS = 16
"""Undecided tokens from which on a place to cut them is looked for."""


@runtime_checkable
class Decoder(Protocol):
    """The half of a tokenizer that turns ids into text. Ids that it does not know give none."""

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = ...) -> str: ...


class Detokenizer:
    """The text of a growing list of tokens.

    The pieces from `push` and `finish` together are `decode(all tokens)`, for every tokenizer whose text only grows.
    Where a SentencePiece tokenizer with byte fallback would take back a whole character, because the bytes after it
    turned out invalid, the character stands. No piece ends in half a character.

    What a token adds may depend on those before it (SentencePiece drops the first token's space), so each is decoded
    behind the tokens of the piece before, and what these give alone is cut off. This window moves on with every piece,
    so the cost of a token does not grow with the text.
    """

    def __init__(
        self, tokenizer: Decoder, *, skip_special_tokens: bool = True, prompt_token_ids: Sequence[int] = ()
    ) -> None:
        """A detokenizer at the start of its text.

        Args:
            tokenizer: decodes ids.
            skip_special_tokens: leave special tokens out of the text.
            prompt_token_ids: tokens that the text continues; they are not part of it.
        """
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        context = list(prompt_token_ids[-_CONTEXT_TOKENS:])
        if self._decode(context).endswith(_REPLACEMENT):
            context = []
        self._start_window(context)

    def push(self, token_id: int) -> str:
        """Text that can no longer change, now that this token follows."""
        before = self._text
        self._window.append(token_id)
        text = self._text = self._decode(self._window)
        if text == before and self._adds_nothing(token_id):
            self._window.pop()
            return ""
        if not text.startswith(self._context_text):
            # Bytes that cannot be a character took the context back: what is undecided stands alone.
            self._start_window([], self._window[self._num_context :], self._num_emitted - len(self._context_text))
            text = self._text
        num_final = len(text) - _num_unfinished(text)
        piece = text[self._num_emitted : num_final]
        if piece and num_final == len(text):
            self._start_window(self._window[self._num_context :])
            return piece
        self._num_emitted = max(self._num_emitted, num_final)
        if len(self._window) - self._num_context >= self._split_at:
            self._split_window(text)
        return piece

    def finish(self) -> str:
        """The rest of the text, unfinished characters as U+FFFD."""
        piece = self._text[self._num_emitted :]
        self._start_window([])
        return piece

    def _start_window(self, context: list[int], undecided: Sequence[int] = (), num_emitted: int = 0) -> None:
        self._context_text = self._decode(context)
        self._num_context = len(context)
        self._num_emitted = len(self._context_text) + num_emitted
        self._window = [*context, *undecided]
        self._text = self._decode(self._window) if undecided else self._context_text
        self._split_at = _MIN_SPLIT_TOKENS

    def _split_window(self, text: str) -> None:
        """Drops tokens whose text cannot change from a long window that no whole character has ended yet."""
        for split in range(len(self._window) - _MAX_UNFINISHED - 1, self._num_context, -1):
            head, tail = self._decode(self._window[:split]), self._decode(self._window[split:])
            if head + tail == text and len(head) <= self._num_emitted:
                self._start_window([], self._window[split:], self._num_emitted - len(head))
                return
            if split < len(self._window) - 2 * _MIN_SPLIT_TOKENS:
                break
        self._split_at *= 2

    def _adds_nothing(self, token_id: int) -> bool:
        """Whether the token has no text anywhere; twice, for the first token's space may be dropped."""
        return not self._decode([token_id, token_id])

    def _decode(self, token_ids: Sequence[int]) -> str:
        if not token_ids:
            return ""
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special_tokens)


def _num_unfinished(text: str) -> int:
    """Trailing characters that more bytes may still turn into others."""
    return min(len(text) - len(text.rstrip(_REPLACEMENT)), _MAX_UNFINISHED)
