"""Training rows, put together on the device from spans of a pool of text: a batch costs a few gathers."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from needle import text
from needle.pool import TextPool
from needle.tokenizer import EOS_ID

PAD, PROSE, ANSWER = 0, 1, 2
MIN_TOKENS_PER_KEY = 48
"""A key sentence, a question about it and the answer are hardly ever longer together."""
MAX_KEYS = 64
CITY_SHARE = 0.7
BOS_SHARE = 0.95
"""Some clients leave BOS out."""
PARTS = 5
"""Spans of an event: opening, name, ending, secret, EOS."""


class Batch(NamedTuple):
    """Rows of one length, each one token longer than what the model sees at once."""

    tokens: Int[Array, "B T+1"]
    kinds: Int[Array, "B T+1"]
    """PAD, PROSE, or ANSWER for what follows `Answer:`, EOS included."""
    positions: Int[Array, "B T+1"]
    """What RoPE is told: in half of the rows it jumps between events, as if much more prose stood there."""


class Events(NamedTuple):
    """What a row says beside its prose: K key sentences, then K questions with their answers."""

    times: Float[Array, "2K"]
    """0 to 1 within the prose, 2 to 3 after it, infinite for what is not said."""
    spans: Int[Array, "2K 5 2"]
    """(start, length) in the pool of every part."""
    kinds: Int[Array, "2K 5"]
    numbers: Int[Array, "2K"]
    """The key's digits as one number."""


@functools.partial(jax.jit, static_argnames=("batch_size", "length", "longest"))
def make_batch(
    pool: TextPool, seed: int | Int[Array, ""], step: int | Int[Array, ""], batch_size: int, length: int, longest: int
) -> Batch:
    """The rows of a training step, with positions under `longest`: the same for the same pool, seed and step."""
    rngs = jax.random.split(jax.random.fold_in(jax.random.key(seed), step), batch_size)
    return jax.vmap(lambda rng: make_row(pool, rng, length + 1, longest + 1))(rngs)


def make_row(pool: TextPool, rng: PRNGKeyArray, length: int, longest: int) -> Batch:
    """One row of `length` tokens, without the leading dimension."""
    rng_events, rng_prose, rng_bos, rng_jumps = jax.random.split(rng, 4)
    events = draw_events(pool, rng_events, max_keys=min(MAX_KEYS, length // MIN_TOKENS_PER_KEY))
    order = jnp.argsort(events.times)
    times = jnp.clip(events.times[order], 0.0, 1.0)
    has_bos = jax.random.bernoulli(rng_bos, BOS_SHARE).astype(jnp.int32)
    room = jnp.maximum(length - has_bos - events.spans[..., 1].sum(), 0)
    gaps = room.astype(jnp.float32) * jnp.diff(times, prepend=0.0, append=1.0)
    prose = draw_prose(pool, rng_prose, gaps.astype(jnp.int32), length)

    bos = pool.bos * jnp.stack([jnp.ones_like(has_bos), has_bos])
    said = jnp.concatenate([prose[:-1, None], events.spans[order]], axis=1).reshape(-1, 2)
    starts, lengths = jnp.concatenate([bos[None], said, prose[-1:]]).T
    event_kinds = jnp.pad(events.kinds[order], ((0, 0), (1, 0)), constant_values=PROSE).reshape(-1)
    kinds = jnp.pad(event_kinds, 1, constant_values=PROSE)
    numbers = jnp.pad(jnp.repeat(events.numbers[order], 1 + PARTS), 1)
    jumps = jnp.pad(jnp.repeat(draw_jumps(rng_jumps, len(order), longest - length), 1 + PARTS), 1, mode="edge")

    ends = jnp.cumsum(lengths)
    place = jnp.arange(length)
    span = jnp.minimum(jnp.searchsorted(ends, place, side="right"), len(ends) - 1)
    is_written = place < ends[-1]
    tokens = pool.tokens[jnp.where(is_written, starts[span] + place - (ends - lengths)[span], 0)]
    digit = tokens - len(pool.without_space)
    digits = numbers[span] // 10 ** (text.NUM_KEY_DIGITS - 1 - jnp.maximum(digit, 0)) % 10
    tokens = jnp.where(digit >= 0, pool.digit_ids[digits], tokens)
    tokens = jnp.where(place == has_bos, pool.without_space[tokens], tokens)
    return Batch(
        tokens=jnp.where(is_written, tokens, EOS_ID),
        kinds=jnp.where(is_written, kinds[span], PAD),
        positions=place + jumps[span],
    )


def draw_events(pool: TextPool, rng: PRNGKeyArray, max_keys: int) -> Events:
    """Tells 1 to `max_keys` keys and asks for 1 to all of them, often as many as there can be.

    Half of the rows ask at their end, the others anywhere after the key was told.
    """
    rngs = iter(jax.random.split(rng, 14))
    index = jnp.arange(max_keys)
    few = jnp.exp(jax.random.uniform(next(rngs)) * jnp.log(1.0 + max_keys)).astype(jnp.int32)
    num_told = jnp.where(jax.random.bernoulli(next(rngs)), jnp.clip(few, 1, max_keys), max_keys)
    some = jax.random.randint(next(rngs), (), 1, num_told + 1)
    num_asked = jnp.where(jax.random.bernoulli(next(rngs)), some, num_told)
    told_times = jax.random.uniform(next(rngs), (max_keys,))
    delays = jax.random.uniform(next(rngs), (max_keys,))
    asks_at_end = jax.random.bernoulli(next(rngs))
    asked_times = jnp.where(asks_at_end, 2.0 + delays, told_times + (1.0 - told_times) * delays)

    # Names must differ within a row: cities in random order, invented ones from a random place on.
    city = jax.random.permutation(next(rngs), len(pool.cities))[:max_keys]
    invented = (jax.random.randint(next(rngs), (), 0, len(pool.invented_names)) + index) % len(pool.invented_names)
    is_city = jax.random.bernoulli(next(rngs), CITY_SHARE, (max_keys, 1))
    names = jnp.where(is_city, pool.cities[city], pool.invented_names[invented])
    numbers = draw_numbers(next(rngs), max_keys)

    phrase = jax.random.randint(next(rngs), (2, max_keys), 0, len(pool.statement_openings))
    secret, eos = (jnp.broadcast_to(span, (max_keys, 2)) for span in (pool.secret, pool.eos))
    told = [pool.statement_openings[phrase[0]], names, pool.statement_endings[phrase[0]], secret, jnp.zeros_like(eos)]
    asked = [pool.question_openings[phrase[1]], names, pool.question_endings[phrase[1]], secret, eos]
    spans = jnp.concatenate([jnp.stack(told, axis=1), jnp.stack(asked, axis=1)])
    is_said = jnp.concatenate([index < num_told, index < num_asked])
    kinds = jnp.full((2 * max_keys, PARTS), PROSE).at[max_keys:, 3:].set(ANSWER)
    return Events(
        times=jnp.where(is_said, jnp.concatenate([told_times, asked_times]), jnp.inf),
        spans=jnp.where(is_said[:, None, None], spans, 0),
        kinds=kinds,
        numbers=jnp.concatenate([numbers, numbers]),
    )


def draw_numbers(rng: PRNGKeyArray, count: int) -> Int[Array, " count"]:
    """Keys' digits, never a multiple of `text.HELD_OUT_DIVISOR`: those are for measuring."""
    rng_quotient, rng_remainder = jax.random.split(rng)
    divisor = text.HELD_OUT_DIVISOR
    quotient = jax.random.randint(rng_quotient, (count,), 0, 10**text.NUM_KEY_DIGITS // divisor)
    return divisor * quotient + jax.random.randint(rng_remainder, (count,), 1, divisor)


def draw_prose(pool: TextPool, rng: PRNGKeyArray, gaps: Int[Array, " G"], longest: int) -> Int[Array, "G 2"]:
    """For every gap, the span of whole sentences that fills it as far as they fit."""
    last = jnp.searchsorted(pool.sentence_starts, pool.sentence_starts[-1] - longest, side="right") - 1
    starts = pool.sentence_starts[jax.random.randint(rng, gaps.shape, 0, last)]
    ends = pool.sentence_starts[jnp.searchsorted(pool.sentence_starts, starts + gaps, side="right") - 1]
    return jnp.stack([starts, ends - starts], axis=1)


def draw_jumps(rng: PRNGKeyArray, count: int, room: int) -> Int[Array, " count"]:
    """How far the positions of each event are ahead of its tokens: rising up to `room`, or nowhere at all."""
    rng_size, rng_share = jax.random.split(rng)
    size = jnp.maximum(jax.random.uniform(rng_size, minval=-1.0), 0.0) * room
    return (size * jnp.sort(jax.random.uniform(rng_share, (count,)))).astype(jnp.int32)
