"""The text of single tokens, for log-probabilities."""

from __future__ import annotations

import dataclasses
import re

from loongjax_server.tokenizer import TextTokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level_alphabet() -> dict[str, int]:
    # Byte-level BPE (GPT-2) spells printable Latin-1 bytes as themselves, the others as U+0100 and up, in order.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_LEVEL_ALPHABET = _byte_level_alphabet()


@dataclasses.dataclass(frozen=True)
class TokenText:
    """What one token stands for."""

    text: str
    """With its leading space; U+FFFD where it is only a part of a character."""
    utf8: bytes | None
    """Its exact bytes, where the vocabulary tells them."""
    is_special: bool
    """Whether it leaves no text when special tokens are skipped."""

    @property
    def spelling(self) -> str:
        """The text, or the bytes where they are only a part of a character; empty if there is neither."""
        if self.utf8 is None:
            return ""
        if self.utf8 == self.text.encode():
            return self.text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.utf8)


class TokenTexts:
    """Texts of tokens, each worked out once."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, TokenText] = {}
        self._labels: dict[int, str] = {}
        self._owners: dict[str, int] = {}
        """By label, the token that has it."""
        # A token after another one keeps the space that decoders strip from the first.
        self._anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
        self._anchor_text = tokenizer.decode(self._anchor, skip_special_tokens=False) if self._anchor else ""

    def __getitem__(self, token_id: int) -> TokenText:
        known = self._known.get(token_id)
        if known is None:
            known = self._known[token_id] = self._work_out(token_id)
        return known

    def label(self, token_id: int) -> str:
        """A name that no other token has, for objects that are keyed by token.

        It is the token's text. `bytes:\\xe2\\x80` names a part of a character, and `token_id:7` a token without text,
        or with a text that another token was named by first.
        """
        label = self._labels.get(token_id)
        if label is None:
            label = self[token_id].spelling or f"token_id:{token_id}"
            if self._owners.setdefault(label, token_id) != token_id:
                label = f"token_id:{token_id}"
            self._labels[token_id] = label
        return label

    def _work_out(self, token_id: int) -> TokenText:
        text = self._tokenizer.decode([*self._anchor, token_id], skip_special_tokens=False)
        if self._anchor and text.startswith(self._anchor_text):
            text = text[len(self._anchor_text) :]
        else:
            text = self._tokenizer.decode([token_id], skip_special_tokens=False)
        is_special = bool(text) and not self._tokenizer.decode([token_id], skip_special_tokens=True)
        if "\N{REPLACEMENT CHARACTER}" not in text:
            return TokenText(text, text.encode(), is_special)
        piece = self._tokenizer.convert_ids_to_tokens([token_id])[0]
        return TokenText(text, _piece_bytes(piece), is_special=False)


def _piece_bytes(piece: str | None) -> bytes | None:
    if not piece:
        return None
    if match := _BYTE_TOKEN.fullmatch(piece):
        return bytes.fromhex(match[1])
    if all(char in _BYTE_LEVEL_ALPHABET for char in piece):
        return bytes(_BYTE_LEVEL_ALPHABET[char] for char in piece)
    return None
