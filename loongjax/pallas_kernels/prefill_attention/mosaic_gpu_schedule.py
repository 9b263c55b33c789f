"""Which query blocks a thread block of Hopper's kernel takes, and which key blocks those visit."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32

from loongjax.pallas_kernels.prefill_attention.visits import Visits


class Schedule(NamedTuple):
    """Which items a thread block takes, in turn; an item is a query block of one head.

    All items are a line: one set of heads after the other; of each the query blocks in the order of `line_up`, in every
    other set in reverse, so that there is no leap from the shortest items to the longest ones; of each query block the
    heads of the set side by side. Thread blocks take their items from the line in rounds, every other round in reverse,
    so that whoever had the longest item of one has the shortest of the next. All have about as much behind them at any
    time, then, and read about the same keys.
    """

    num_q_heads: int
    num_q_blocks: int
    num_programs: int
    num_heads_abreast: int
    """In a set; divides `num_q_heads`."""
    paced_blocks: int | None = None
    """Key blocks that an item has to visit for thread blocks to wait for each other, see `Pace`; None: they never do.
    The first in line visits most, then.
    """

    @property
    def num_rounds(self) -> jax.Array:
        """Items of this thread block."""
        num_items = self.num_q_heads * self.num_q_blocks
        full = jnp.int32(num_items // self.num_programs)
        return full + (self._place(full) < num_items).astype(jnp.int32)

    def item(self, number: jax.Array) -> tuple[jax.Array, jax.Array]:
        """This thread block's item of a round: the query block's place in line, and the query head. Behind the last
        round, the last one's.
        """
        number = jnp.minimum(number, self.num_rounds - 1)
        heads, items = jnp.int32(self.num_heads_abreast), jnp.int32(self.num_heads_abreast * self.num_q_blocks)
        place = self._place(number)
        place_in_set = lax.rem(place, items)
        set_of_heads, place_in_line = lax.div(place, items), lax.div(place_in_set, heads)
        # Of the last set the shortest ones come last.
        is_reverse = lax.rem(self.num_q_heads // self.num_heads_abreast - 1 - set_of_heads, jnp.int32(2)) == 1
        place_in_line = jnp.where(is_reverse, self.num_q_blocks - 1 - place_in_line, place_in_line)
        return place_in_line, set_of_heads * heads + lax.rem(place_in_set, heads)

    def _place(self, number: jax.Array) -> jax.Array:
        program = lax.axis_index("program")
        is_reverse = lax.rem(number, jnp.int32(2)) == 1
        return number * self.num_programs + jnp.where(is_reverse, self.num_programs - 1 - program, program)


class Work(NamedTuple):
    """An item: a query block of a head, and the key blocks that it visits."""

    q_block: jax.Array
    q_head: jax.Array
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


def line_up(visits: Visits, *, by_length: bool) -> Int32[Array, "q_blocks 5"]:
    """The query blocks in the order in which they are taken: their number, and their `Visits`.

    Args:
        visits: of the query blocks.
        by_length: whether those that visit most key blocks come first. Else the last ones do, which see most under a
            causal mask; of equal ones they do in any case.
    """
    count = visits.num_blocks.shape[0]
    number = jnp.arange(count, dtype=jnp.int32)
    rows = jnp.stack([number, *visits], axis=1)
    if not by_length:
        return rows[::-1]
    # All pairs are compared, which for so few takes less time than a sort.
    length = visits.num_blocks
    longer = length[None, :] > length[:, None]
    later = (length[None, :] == length[:, None]) & (number[None, :] > number[:, None])
    place = (longer | later).sum(axis=1, dtype=jnp.int32)
    return jnp.where((place[None, :] == number[:, None])[..., None], rows[None], 0).sum(axis=1)


def most_blocks(visits_gmem: Any) -> jax.Array:
    """Key blocks of the first in line."""
    return visits_gmem[0, 2]


def find_work(visits_gmem: Any, schedule: Schedule, number: jax.Array, num_before: jax.Array) -> Work:
    """This thread block's item of a round.

    Args:
        visits_gmem: what `line_up` gives.
        schedule: which items there are.
        number: of the round.
        num_before: key blocks visited before.
    """
    place, q_head = schedule.item(number)
    q_block, first_key, num_blocks, bare_begin, bare_end = (visits_gmem[place, column] for column in range(5))
    num_masked = num_blocks - (bare_end - bare_begin)
    return Work(q_block, q_head, first_key, num_blocks, num_masked, bare_begin, num_before)
