"""The command line of `loongjax profile iteration`."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Annotated, Literal

import tyro

from loongjax.config import CPU_NUM_DEVICES, EngineConfig
from loongjax.errors import ConfigError
from loongjax_profiling.iteration.grids import GridName

MAX_NUM_BATCHED_TOKENS = {"gpu": 131_072, "cpu": 2048}
"""Tokens of the longest prefill on one instance, unless it is given, by platform."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class IterationCommand:
    """Measures iterations of the engine's own programs on all devices, and stores their times in a database.

    What the database has for this kind of device and this model is not measured again.

    Raises:
        ConfigError: a combination that cannot work.
    """

    checkpoint: tyro.conf.Positional[str | None] = None
    """Folder of a checkpoint; None: the small model that ships with the project, or --random-weights."""
    random_weights: Literal["llama2-7b", "llama3-8b", "tiny"] | None = None
    """Random weights of this shape instead of a checkpoint's."""
    grid: tuple[GridName, ...]
    """Which points, side by side. analytical-model: what `loongjax fit` needs; multi-node: that for more instances;
    chunks: prompts in chunks beside decodes, for the policy chunked; figure2, figure3, figure13: what `loongjax plot`
    draws them from; scale-down, scale-up: each a half of figure13; sp-vs-tp: single requests on ever more devices;
    tp-base: batches on one instance; toy, example: two points each."""
    db: pathlib.Path
    """SQLite file; it is made if there is none."""
    limit_s: float | None = None
    """Stops after so many seconds, compilation included; what is measured by then is spread over all strategies and
    scales. None: never."""
    tp: tuple[int, ...] = ()
    """Only instances of so many devices; empty: all sizes that divide the model."""
    shrink: int | None = None
    """Divides all lengths; None: 1 on a GPU, 256 elsewhere."""
    rounds: int = 3
    """Repetitions of a prefill, extend or migration that count."""
    num_steps: int = 8
    """Steps of a decode that count, each time it is visited."""
    visits: int = 3
    """How often a decode is measured, with others in between: a host that is slow for a moment is so in one of them."""
    retry_failed: bool = False
    """Measures points again that failed in an earlier run."""
    max_num_batched_tokens: int | None = None
    """Tokens of one prefill or extend on one instance: longer ones are left out. None: what the points need, at most
    131072 on a GPU and 2048 elsewhere."""
    max_num_seqs: int = 256
    """Requests of one master and of one prefill or extend: larger batches are left out."""
    num_slots: int | None = None
    """Tokens that one instance's part of the KV pool holds; None: from free memory, on CPU 16384."""
    page_size: int = EngineConfig.page_size
    """Tokens a page of the KV pool holds. A point that is there for another size is not measured again: give each its
    own database."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type of weights, activations and KV pool; auto: the model's, with float32 as bfloat16 on GPU."""
    exchange: Literal["auto", "xla"] = "auto"
    """How GPUs exchange the small messages of a step, as in `loongjax serve`. Points do not say which it was: give
    each its own database."""
    memory_fraction: float = EngineConfig.memory_fraction
    """Part of each GPU's memory that weights, KV pool and workspace may take."""
    num_cpu_devices: int = CPU_NUM_DEVICES
    """Virtual devices to make when there is no GPU."""
    compilation_cache_dir: str | None = None
    """Folder of JAX's persistent compilation cache; None: ~/.cache/loongjax/xla."""
    commit: Annotated[str | None, tyro.conf.arg(metavar="SHA")] = None
    """Of this code, to be stored; None: git is asked."""

    def __post_init__(self) -> None:
        if not self.grid:
            raise ConfigError("--grid names no group of points: `loongjax profile iteration --help` lists them")
        if self.checkpoint is not None and self.random_weights is not None:
            raise ConfigError("a checkpoint and --random-weights are two models: give one of them")
        for name in ("shrink", "limit_s", "rounds", "num_steps", "visits", "max_num_seqs", "max_num_batched_tokens"):
            value = getattr(self, name)
            if value is not None and not value >= 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {value}: leave it out")
        if any(tp < 1 for tp in self.tp):
            raise ConfigError(
                f"--tp must be at least 1, got {min(self.tp)}: leave it out for all that divide the model"
            )
        self.engine_config(tp=1, max_num_batched_tokens=1)

    def engine_config(
        self, *, tp: int, max_num_batched_tokens: int, max_extend_tokens: int | None = None
    ) -> EngineConfig:
        """Of the runtime that is measured, and of extends up to so many tokens (None: of none). Raises ConfigError for
        a setting that cannot work.
        """
        return EngineConfig(
            # Nothing is planned by it, but room is left for what its extends copy.
            policy=EngineConfig.policy if max_extend_tokens is None else "chunked",
            chunk_tokens=max_extend_tokens or EngineConfig.chunk_tokens,
            checkpoint=self.checkpoint,
            tp=tp,
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_seqs=self.max_num_seqs,
            num_slots=self.num_slots,
            page_size=self.page_size,
            dtype=self.dtype,
            exchange=self.exchange,
            memory_fraction=self.memory_fraction,
            num_cpu_devices=self.num_cpu_devices,
            warm_up=False,  # only what the points need is compiled, as it is needed
            compilation_cache_dir=self.compilation_cache_dir,
        )
