"""Log-probabilities as the two APIs, and prompt_logprobs, spell them."""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from loongjax.core.request import TokenLogprobs
from loongjax_server.json_pieces import SLICE, JsonArray
from loongjax_server.token_text import TokenText, TokenTexts

MIN_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON does not have."""


class CompletionLogprobs:
    """Writes the `logprobs` objects of one choice of a completion; text offsets run on from object to object.

    Tokens are spelled by their labels, which are unique: what `top_logprobs` says under a label is that token's.
    """

    def __init__(self, token_texts: TokenTexts, *, skip_special_tokens: bool) -> None:
        self._token_texts = token_texts
        self._skip_special_tokens = skip_special_tokens
        self._offset = 0
        # Characters may span tokens, so offsets are counted in decoded characters.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def write(self, tokens: Iterable[TokenLogprobs], first_token_id: int | None = None) -> dict[str, Any]:
        """The object for these tokens.

        Args:
            tokens: generated tokens, or prompt tokens from the second on followed by generated ones.
            first_token_id: the prompt's first token, which has no log-probability.
        """
        entries: list[tuple[int, float | None, dict[str, float] | None]] = []
        if first_token_id is not None:
            entries.append((first_token_id, None, None))
        entries.extend((token.token_id, _finite(token.logprob), self._top(token)) for token in tokens)
        return {
            "text_offset": [self._advance(self._token_texts[token_id]) for token_id, _, _ in entries],
            "token_logprobs": [logprob for _, logprob, _ in entries],
            "tokens": [self._token_texts.label(token_id) for token_id, _, _ in entries],
            "top_logprobs": [top for _, _, top in entries],
        }

    def write_arrays(
        self, arrays: Mapping[str, JsonArray], tokens: Iterable[TokenLogprobs], first_token_id: int | None = None
    ) -> None:
        """Appends to an object's arrays, as `empty_arrays` makes them, however many tokens there are. See `write`."""
        for some in itertools.batched(tokens, SLICE):
            for name, values in self.write(some, first_token_id).items():
                arrays[name].extend(values)
            first_token_id = None
        if first_token_id is not None:
            for name, values in self.write((), first_token_id).items():
                arrays[name].extend(values)

    @staticmethod
    def empty_arrays() -> dict[str, JsonArray]:
        """The object before any token."""
        return {name: JsonArray() for name in ("text_offset", "token_logprobs", "tokens", "top_logprobs")}

    def _top(self, token: TokenLogprobs) -> dict[str, float]:
        top: dict[str, float] = {}
        for token_id, logprob in (*token.top, (token.token_id, token.logprob)):
            top.setdefault(self._token_texts.label(token_id), _finite(logprob))
        return top

    def _advance(self, token: TokenText) -> int:
        offset = self._offset
        if not (token.is_special and self._skip_special_tokens):
            self._offset += len(token.text) if token.utf8 is None else len(self._decoder.decode(token.utf8))
        return offset


def chat_logprobs(tokens: Sequence[TokenLogprobs], token_texts: TokenTexts) -> dict[str, Any]:
    """The `logprobs` object of a chat choice, or of one chunk of it."""
    return {
        "content": [
            {
                **_chat_token(token_texts[token.token_id], token.logprob),
                "top_logprobs": [_chat_token(token_texts[token_id], logprob) for token_id, logprob in token.top],
            }
            for token in tokens
        ],
        "refusal": None,
    }


def _chat_token(token: TokenText, logprob: float) -> dict[str, Any]:
    utf8 = None if token.utf8 is None else list(token.utf8)
    return {"token": token.text, "logprob": _finite(logprob), "bytes": utf8}


def prompt_logprobs(tokens: Sequence[TokenLogprobs], token_texts: TokenTexts) -> Iterator[dict[str, Any] | None]:
    """Entries of `prompt_logprobs`: null for the first token, then token id to log-probability, rank and text."""
    yield None
    for token in tokens:
        ranked = [(token_id, logprob, rank) for rank, (token_id, logprob) in enumerate(token.top, start=1)]
        ranked.append((token.token_id, token.logprob, token.rank))
        yield {
            str(token_id): {
                "logprob": _finite(logprob),
                "rank": rank,
                "decoded_token": token_texts[token_id].text,
            }
            for token_id, logprob, rank in ranked
        }


def _finite(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB)
