"""What the variants of ring attention share: one rank's place on the ring, and what it does with a block of keys."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from loongjax.parallel.striped import visible_ranges

type Visit[Carry] = Callable[[jax.Array, jax.Array, jax.Array, Carry], Carry]
"""(source_rank, its keys, its values, carry) -> carry"""

type Partial = tuple[jax.Array, jax.Array]
"""Output [T, N, H] and natural log-sum-exp [T, N] of this rank's rows over some of the keys."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ring[Carry]:
    """One rank's share of a ring attention over n ranks."""

    axis_name: str
    """The mesh axis."""
    num_ranks: int
    """n"""
    rank: Int32[Array, ""]
    """Which one this is."""
    q: Float[Array, "T N H"]
    """Its queries."""
    row_starts: Int32[Array, "T"]
    """As in `ring_attention`."""
    attend: Callable[..., Partial]
    """`prefill_attention`, but for its operands and the dtype of its output."""
    visit: Visit[Carry]
    """What sees every block of keys."""

    def source_rank(self, step: int | Int32[Array, ""]) -> Int32[Array, ""]:
        """Whose keys are here at a step, if every step hands them to the next rank."""
        return (self.rank - step) % self.num_ranks

    def take_in(
        self, step: int | Int32[Array, ""], block: Float[Array, "kv T K H"], carry: Carry
    ) -> tuple[Partial, Carry]:
        """Visits the block of this step, keys and values, and attends to it, in float32."""
        source_rank = self.source_rank(step)
        k, v = block[0], block[1]
        carry = self.visit(source_rank, k, v, carry)
        k_start, k_end = visible_ranges(self.row_starts, self.rank, source_rank, self.num_ranks)
        return self.attend(self.q, k, v, k_start, k_end, out_dtype=jnp.float32), carry
