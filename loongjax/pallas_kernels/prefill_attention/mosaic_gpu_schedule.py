"""Which query blocks a thread block of Hopper's kernel takes, and which key blocks those visit."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Schedule(NamedTuple):
    """Which items a thread block takes, in turn; an item is a query block of one head.

    All items are a line: one set of heads after the other; of each the last query blocks, which see most under a causal
    mask, first; of each query block the heads of the set side by side. Thread blocks take their items from the line in
    rounds, every other round in reverse, so that whoever had the longest item of one has the shortest of the next.
    """

    num_q_heads: int
    num_q_blocks: int
    num_programs: int
    num_heads_abreast: int
    """In a set; divides `num_q_heads`."""

    @property
    def num_rounds(self) -> jax.Array:
        """Items of this thread block."""
        num_items = self.num_q_heads * self.num_q_blocks
        full = jnp.int32(num_items // self.num_programs)
        return full + (self._place(full) < num_items).astype(jnp.int32)

    def item(self, number: jax.Array) -> tuple[jax.Array, jax.Array]:
        """This thread block's item of a round: query block and query head. Behind the last round, the last one's."""
        number = jnp.minimum(number, self.num_rounds - 1)
        heads, items = jnp.int32(self.num_heads_abreast), jnp.int32(self.num_heads_abreast * self.num_q_blocks)
        place = self._place(number)
        place_in_set = lax.rem(place, items)
        q_head = lax.div(place, items) * heads + lax.rem(place_in_set, heads)
        return self.num_q_blocks - 1 - lax.div(place_in_set, heads), q_head

    def _place(self, number: jax.Array) -> jax.Array:
        program = lax.axis_index("program")
        is_reverse = lax.rem(number, jnp.int32(2)) == 1
        return number * self.num_programs + jnp.where(is_reverse, self.num_programs - 1 - program, program)


class Work(NamedTuple):
    """The key blocks that an item visits."""

    first_key: jax.Array
    num_blocks: jax.Array
    """Of these, all steps below `num_masked` mask."""
    num_masked: jax.Array
    bare_begin: jax.Array
    num_before: jax.Array
    """Blocks that this thread block visited for earlier items."""

    def block_begin(self, step: jax.Array, block_kv: int) -> jax.Array:
        """The first key of the block visited at this step: masked blocks come first, in order, then bare ones."""
        num_bare = self.num_blocks - self.num_masked
        masked = step + jnp.where(step < self.bare_begin, 0, num_bare)
        bare = step - self.num_masked + self.bare_begin
        return self.first_key + block_kv * jnp.where(step < self.num_masked, masked, bare)


def find_work(visits_gmem: Any, schedule: Schedule, number: jax.Array, num_before: jax.Array) -> Work:
    """The key blocks of this thread block's item of a round.

    Args:
        visits_gmem: `Visits` of all query blocks, [q_blocks, 4].
        schedule: which items there are.
        number: of the round.
        num_before: key blocks visited before.
    """
    q_block, _ = schedule.item(number)
    first_key, num_blocks, bare_begin, bare_end = (visits_gmem[q_block, column] for column in range(4))
    num_masked = num_blocks - (bare_end - bare_begin)
    return Work(first_key, num_blocks, num_masked, bare_begin, num_before)
