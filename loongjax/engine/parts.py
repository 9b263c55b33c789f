"""What an engine is handed over as, once built."""

from __future__ import annotations

import dataclasses
from typing import Protocol, runtime_checkable

from loongjax.engine.core import EngineCore
from loongjax.engine.detokenizer import Decoder


@runtime_checkable
class TextTokenizer(Decoder, Protocol):
    """Text to token ids and back."""

    def encode(self, text: str, add_special_tokens: bool = ...) -> list[int]: ...


@dataclasses.dataclass(frozen=True)
class EngineParts:
    """A step loop that is ready, and the tokenizer of its model."""

    core: EngineCore
    tokenizer: TextTokenizer
