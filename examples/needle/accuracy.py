"""How often greedy decoding finds the key, by prompt length and depth."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int
from tokenizers import Tokenizer

from needle import text
from needle.model import Attend, ModelConfig, Params, hidden_states, logits
from needle.prompts import Example
from needle.tokenizer import EOS_ID

ANSWER_TOKENS = len(text.answer(text.KEY_TEMPLATE)) + 1
"""The answer's characters, and EOS."""

PADDED_LENGTHS = tuple(64 + 128 * 4**i for i in range(6))
"""Buckets, in tokens, so that few programs are compiled: 192, 576, 2112, 8256 and so on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to run the model."""

    params: Params
    """In the dtype to compute in."""
    attend: Attend
    tokens_per_pass: int
    """Tokens of one forward pass, at least one row."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Of all examples of one length."""

    length: int
    """Tokens of the prompts."""
    num_keys: int
    num_right: int
    num_right_by_depth: dict[str, str]
    """As in "18 of 18"."""


def summarize(length: int, depths: Sequence[float], is_right: Sequence[bool]) -> Accuracy:
    """Counts the right ones of examples whose depths are given in the same order."""
    by_depth = {depth: [right for at, right in zip(depths, is_right, strict=True) if at == depth] for depth in depths}
    return Accuracy(
        length=length,
        num_keys=len(is_right),
        num_right=sum(is_right),
        num_right_by_depth={str(depth): f"{sum(found)} of {len(found)}" for depth, found in by_depth.items()},
    )


def find_right(variant: Variant, config: ModelConfig, tokenizer: Tokenizer, examples: Sequence[Example]) -> list[bool]:
    """For every example, whether greedy decoding would produce the whole answer and EOS.

    One forward pass over prompt and answer decides it: decoding is right just if every token of the right answer is
    the most likely one after those before it.
    """
    prompts = [encoding.ids for encoding in tokenizer.encode_batch([example.prompt for example in examples])]
    padded = min(length for length in PADDED_LENGTHS if length >= max(map(len, prompts)) + ANSWER_TOKENS)
    rows = min(len(examples), max(1, variant.tokens_per_pass // padded))
    tokens = np.full((-(-len(examples) // rows) * rows, padded), EOS_ID, np.int32)
    starts = np.ones(len(tokens), np.int32)
    for i, (prompt, example) in enumerate(zip(prompts, examples, strict=True)):
        expected = tokenizer.encode(example.answer, add_special_tokens=False).ids
        tokens[i, : len(prompt) + ANSWER_TOKENS] = [*prompt, *expected, EOS_ID]
        starts[i] = len(prompt)
    right: list[bool] = []
    for i in range(0, len(tokens), rows):
        part = is_answered(variant.params, config, tokens[i : i + rows], starts[i : i + rows], variant.attend)
        right += np.asarray(part).tolist()
    return right[: len(examples)]


@functools.partial(jax.jit, static_argnames=("config", "attend"))
def is_answered(
    params: Params, config: ModelConfig, tokens: Int[Array, "B T"], starts: Int[Array, " B"], attend: Attend
) -> Bool[Array, " B"]:
    """Whether every answer token, from `starts` on, is the most likely one at its place."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    hidden = hidden_states(params, config, tokens, positions, attend)
    at = starts[:, None] + jnp.arange(ANSWER_TOKENS)[None]
    predicted = logits(params, jnp.take_along_axis(hidden, at[..., None] - 1, axis=1)).argmax(axis=-1)
    return (predicted == jnp.take_along_axis(tokens, at, axis=1)).all(axis=1)
