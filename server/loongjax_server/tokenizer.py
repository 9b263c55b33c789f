"""What the server needs of a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class TextTokenizer(Protocol):
    """Text to token ids and back. Called from several threads at once."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def has_chat_template(self) -> bool: ...

    @property
    def takes_tools(self) -> bool:
        """Whether its chat template has a place for tools."""
        ...

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> list[int]:
        """Token ids of a conversation.

        Args:
            messages: each with `role` and `content`.
            kwargs: `add_generation_prompt`, `continue_final_message`, `tools`, `chat_template` (text that replaces the
                tokenizer's own), and any other variable of the template.
        """
        ...

    def convert_ids_to_tokens(self, token_ids: Sequence[int]) -> Sequence[str | None]:
        """The vocabulary's own spelling of each id; None for an id that it does not have."""
        ...
