"""How often greedy decoding finds the key, by prompt length and depth."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int
from tokenizers import Tokenizer

from needle import text
from needle.model import Attend, ModelConfig, Params, hidden_states, logits
from needle.prompts import Example, PromptWriter
from needle.tokenizer import EOS_ID

ANSWER_TOKENS = len(text.answer("0000-0000")) + 1
"""The answer's characters, and EOS."""

PADDED_LENGTHS = tuple(64 + 128 * 4**i for i in range(6))
"""Buckets of tokens, so that few programs are compiled: 192, 576, 2112, 8256 and so on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to run the model."""

    params: Params
    """In the dtype to compute in."""
    attend: Attend
    tokens_per_pass: int
    """Tokens of one forward pass, at least one row."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One length and depth of the grid."""

    length: int
    """Tokens of the prompts."""
    depth: float
    num_keys: int
    num_right: dict[str, int]
    """By variant."""


def count_right(variant: Variant, config: ModelConfig, tokenizer: Tokenizer, examples: Sequence[Example]) -> int:
    """Counts the examples whose whole answer, EOS included, greedy decoding would produce.

    One forward pass over prompt and answer decides it: decoding is right just if every token of the right answer is
    the most likely one after those before it.
    """
    prompts = [encoding.ids for encoding in tokenizer.encode_batch([example.prompt for example in examples])]
    padded = min(length for length in PADDED_LENGTHS if length >= max(map(len, prompts)) + ANSWER_TOKENS)
    rows = min(len(examples), max(1, variant.tokens_per_pass // padded))
    tokens = np.full((-(-len(examples) // rows) * rows, padded), EOS_ID, np.int32)
    starts = np.zeros(len(tokens), np.int32)
    for i, (prompt, example) in enumerate(zip(prompts, examples, strict=True)):
        expected = tokenizer.encode(example.answer, add_special_tokens=False).ids
        tokens[i, : len(prompt) + ANSWER_TOKENS] = [*prompt, *expected, EOS_ID]
        starts[i] = len(prompt)
    right = [
        np.asarray(is_answered(variant.params, config, tokens[i : i + rows], starts[i : i + rows], variant.attend))
        for i in range(0, len(tokens), rows)
    ]
    return int(np.concatenate(right)[: len(examples)].sum())


@functools.partial(jax.jit, static_argnames=("config", "attend"), compiler_options={"xla_gpu_autotune_level": 0})
def is_answered(
    params: Params, config: ModelConfig, tokens: Int[Array, "B T"], starts: Int[Array, " B"], attend: Attend
) -> Bool[Array, " B"]:
    """Whether every answer token, from `starts` on, is the most likely one at its place."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    hidden = hidden_states(params, config, tokens, positions, attend)
    at = starts[:, None] + jnp.arange(ANSWER_TOKENS)[None]
    predicted = logits(params, jnp.take_along_axis(hidden, at[..., None] - 1, axis=1)).argmax(axis=-1)
    return (predicted == jnp.take_along_axis(tokens, at, axis=1)).all(axis=1)


def measure_grid(
    variants: Mapping[str, Variant],
    config: ModelConfig,
    tokenizer: Tokenizer,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    num_keys: int,
    seed: int,
) -> Iterator[Cell]:
    """Measures every variant on the same examples, cell by cell."""
    writer = PromptWriter(tokenizer, seed)
    for length in lengths:
        for depth in depths:
            examples = writer.examples(length, depth, num_keys)
            yield Cell(
                length=length,
                depth=depth,
                num_keys=num_keys,
                num_right={
                    name: count_right(variant, config, tokenizer, examples) for name, variant in variants.items()
                },
            )
