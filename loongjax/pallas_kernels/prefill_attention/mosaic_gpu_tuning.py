"""How Hopper's kernel cuts its work."""

import dataclasses

from loongjax.errors import ConfigError

WARPGROUP_ROWS = 64
"""Query rows that one warpgroup computes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillTuning:
    """How the work is cut, and how the warpgroups of a thread block take turns."""

    block_q: int = 128
    """Query rows of a thread block, 64 for each warpgroup that computes: 128 or 192."""
    block_kv: int = 128
    """Keys of a key block: a multiple of 64, at most 256."""
    num_stages: int = 2
    """Key blocks, and value blocks, that shared memory holds."""
    overlap: bool = True
    """Whether a warpgroup multiplies the values of one key block while the softmax of the next one runs. If not, each
    block's scores, softmax and output follow one another, in fewer registers.
    """
    q_in_registers: bool = False
    """Whether the queries are read from shared memory once, instead of for every key block."""
    cluster: int = 2
    """Thread blocks that bring key blocks to each other: 1 or 2."""
    take_turns: bool = False
    """Whether the warpgroups issue their matrix products in turn, so that the softmax of one hides behind another's.
    With `overlap` that cost a fifth on an H200: in TFLOP/s, bf16, 16K tokens, 32 query and 8 KV heads of 128, with and
    without turns, 427 and 527 under a causal mask, 424 and 553 under none.
    """

    def __post_init__(self) -> None:
        if self.block_q not in (128, 192):
            raise ConfigError(f"block_q must be 128 or 192, got {self.block_q}")
        if self.block_kv not in (64, 128, 192, 256):
            raise ConfigError(f"block_kv must be 64, 128, 192 or 256, got {self.block_kv}")
        if self.cluster not in (1, 2):
            raise ConfigError(f"cluster must be 1 or 2, got {self.cluster}")
        if self.num_stages < 2:
            raise ConfigError(f"num_stages must be at least 2, got {self.num_stages}")

    def clustered_rows(self, group_size: int) -> int:
        """Query rows of a cluster whose key blocks are visited together, given the query heads of a KV head."""
        return self.block_q if group_size % self.cluster == 0 else self.block_q * self.cluster

    @property
    def num_compute_warpgroups(self) -> int:
        return self.block_q // WARPGROUP_ROWS

    @property
    def registers(self) -> tuple[int, int]:
        """Registers of a thread that computes, and of one that copies; warpgroups have 512 together."""
        if self.q_in_registers:
            return (240, 24) if self.num_compute_warpgroups == 2 else (160, 32)
        return (232, 40) if self.num_compute_warpgroups == 2 else (160, 32)
