"""How Hopper's kernel cuts its work."""

import dataclasses

from loongjax.errors import ConfigError

WARPGROUP_ROWS = 64
"""Query rows that one warpgroup computes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillTuning:
    """How the work is cut."""

    block_q: int = 128
    """Query rows of a thread block, 64 for each warpgroup that computes: 128 or 192."""
    block_kv: int = 128
    """Keys of a key block: a multiple of 64, at most 256."""
    num_stages: int = 2
    """Key blocks, and value blocks, that shared memory holds."""
    num_programs: int | None = None
    """Thread blocks among which the query blocks of all heads are dealt out; None: one a multiprocessor. If there are
    as many as query blocks, the GPU starts one as another ends.
    """
    num_heads_abreast: int | None = None
    """Query heads that are computed at a time, a divisor of their number; None: `choose_heads_abreast`, and
    if there are no more than this, all."""

    def __post_init__(self) -> None:
        if self.block_q not in (128, 192):
            raise ConfigError(f"block_q must be 128 or 192, got {self.block_q}")
        if self.block_kv not in (64, 128, 192, 256):
            raise ConfigError(f"block_kv must be 64, 128, 192 or 256, got {self.block_kv}")
        if self.num_stages < 2:
            raise ConfigError(f"num_stages must be at least 2, got {self.num_stages}")
        if self.num_programs is not None and self.num_programs < 1:
            raise ConfigError(f"num_programs must be at least 1, got {self.num_programs}")
        if self.num_heads_abreast is not None and self.num_heads_abreast < 1:
            raise ConfigError(f"num_heads_abreast must be at least 1, got {self.num_heads_abreast}")

    @property
    def num_compute_warpgroups(self) -> int:
        return self.block_q // WARPGROUP_ROWS

    @property
    def registers(self) -> tuple[int, int]:
        """Registers of a thread that computes, and of one that copies; warpgroups have 512 together."""
        return (232, 40) if self.num_compute_warpgroups == 2 else (160, 32)
