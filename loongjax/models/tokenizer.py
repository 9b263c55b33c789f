"""A checkpoint's tokenizer and chat template, through transformers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from loongjax.errors import CheckpointError, RequestError


class Tokenizer:
    """Text to token ids and back. Ids that are not the tokenizer's own (padded vocabularies have them) are empty text.

    Args:
        tokenizer: a fast tokenizer of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens = {token_id: token for token, token_id in tokenizer.get_vocab().items()}

    @property
    def vocab_size(self) -> int:
        """Ids from 0 that the tokenizer knows, added tokens included; the model's vocabulary may be larger."""
        return max(self._tokens, default=-1) + 1

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokenizer's own EOS, if it has one."""
        eos = self._tokenizer.eos_token_id
        return () if eos is None else (eos,)

    @property
    def all_special_ids(self) -> frozenset[int]:
        return frozenset(self._tokenizer.all_special_ids)

    @property
    def has_chat_template(self) -> bool:
        return self._tokenizer.chat_template is not None

    @property
    def takes_tools(self) -> bool:
        """Whether the chat template, or one of several, has a place for tools: then it names them."""
        template = self._tokenizer.chat_template or ""
        return any("tools" in text for text in ([template] if isinstance(template, str) else template.values()))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Lone surrogates, which no tokenizer takes, become the replacement character."""
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        # Not verbose: what is too long for the model is said on admission, and by transformers in words of training.
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens, verbose=False)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of token ids; half a character at the end becomes the replacement character."""
        return self._tokenizer.decode(
            [token_id for token_id in token_ids if token_id in self._tokens],
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )

    def convert_ids_to_tokens(self, token_ids: Iterable[int]) -> list[str]:
        """Each id's token as the vocabulary spells it; "" for ids that are not the tokenizer's."""
        return [self._tokens.get(token_id, "") for token_id in token_ids]

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> list[int]:
        """Token ids of a conversation.

        Args:
            messages: each with "role" and "content".
            kwargs: passed to the template. By default `add_generation_prompt` is true, and `chat_template` is the
                checkpoint's.

        Raises:
            RequestError: there is no template, or it rejects the messages.
        """
        if not self.has_chat_template and not kwargs.get("chat_template"):
            raise RequestError("this model has no chat template; use /v1/completions", "messages")
        options = {"add_generation_prompt": True} | kwargs
        try:
            text = self._tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
        except (TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise RequestError(f"the chat template rejects these messages: {error}", "messages") from None
        return self.encode(text, add_special_tokens=False)


def load_tokenizer(checkpoint_dir: Path | str) -> Tokenizer:
    """The tokenizer in a checkpoint's folder. Never goes online, never runs code from the folder.

    Raises:
        CheckpointError: no such folder, no tokenizer in it, or one that transformers cannot read; or a config.json that
            neither it nor this engine accepts.
    """
    folder = Path(checkpoint_dir)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give the path of a Hugging Face checkpoint's folder")
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        raise CheckpointError(f"{folder} has no tokenizer (tokenizer.json or tokenizer.model)")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it warns that there is no PyTorch
    from transformers import AutoTokenizer  # here, because it takes a second that `--help` should not

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), use_fast=True, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # whatever a malformed file provokes in three libraries
        from loongjax.models.config import ModelConfig  # here, because a process that only tokenizes needs no JAX

        ModelConfig.from_checkpoint(folder)  # transformers reads config.json too, and refuses it in other words
        raise CheckpointError(f"the tokenizer in {folder} cannot be read: {error}") from error
    return Tokenizer(tokenizer)
