"""The engine's configuration. Command-line flags come from it."""

from __future__ import annotations

import dataclasses
import pathlib
import typing
from typing import Literal

import tyro

from loongjax.errors import ConfigError

CPU_NUM_SLOTS = 16384
"""Tokens an instance's part of the KV pool holds on CPU, which reports no memory to size it by."""

CPU_NUM_DEVICES = 8
"""Virtual devices on CPU."""


PolicyName = Literal["esp", "simple", "static", "replicated", "prefill-first", "chunked", "disaggregated"]
"""See `loongjax.scheduler.build`."""

POLICIES: tuple[str, ...] = typing.get_args(PolicyName)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SchedulingConfig:
    """Which policy decides, and what it is told.

    Raises:
        ConfigError: a value that cannot work on any cluster.
    """

    policy: PolicyName = "esp"
    """Who works with whom. esp: elastic, by predicted times; simple: elastic, by thresholds; static: every iteration on
    all instances; replicated: each instance for itself; prefill-first: one instance, as in vLLM 0.3; chunked:
    each instance for itself, prompts cut into chunks beside the decodes, as in SplitFuse; disaggregated: prefill and
    decode apart, as in DistServe."""
    cost_model: str | None = None
    """File with the times of iterations, as `loongjax fit` writes it, for the policy esp; None: a roofline estimate for
    the devices."""
    scale_up: bool = True
    """The policy esp lets instances join a decode group while it runs."""
    admission: Literal["quantile", "worst-case"] = "quantile"
    """How long the policy esp takes outputs to be when it lets a request into memory; quantile: by those that have
    ended; worst-case: as long as each request allows."""
    explain: str | None = None
    """File to which the policy esp appends every decision's terms of gain and cost, as JSON lines."""
    chunk_tokens: int = 512
    """Tokens of one iteration of the policy chunked: those of decodes first, then chunks of prompts."""
    num_prefill_instances: int | None = None
    """Instances that the policy disaggregated prefills on; None: half."""
    prefill_tokens_per_instance: int = 2048
    """The policy simple gives a prefill one instance for so many tokens, rounded up."""
    max_requests_per_master: int | None = None
    """Requests that one master decodes before idle instances join as masters; None: half of max_num_seqs."""

    def __post_init__(self) -> None:
        _check_choice("--policy", self.policy, POLICIES)
        _check_choice("--admission", self.admission, ("quantile", "worst-case"))
        for name in ("chunk_tokens", "num_prefill_instances", "prefill_tokens_per_instance", "max_requests_per_master"):
            _check_at_least_one(name, getattr(self, name))

    @property
    def cuts_prompts(self) -> bool:
        """Whether the policy computes prompts in chunks, so that they may be longer than one prefill."""
        return self.policy == "chunked"

    @property
    def max_extend_tokens(self) -> int | None:
        """Tokens of the largest extend that the policy plans; None: it plans none."""
        return self.chunk_tokens if self.cuts_prompts else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig(SchedulingConfig):
    """What an engine is made of.

    Raises:
        ConfigError: a value that cannot work, whatever the checkpoint and the devices.
    """

    checkpoint: tyro.conf.Positional[str | None] = None
    """Folder of a Hugging Face or converted checkpoint; None: the small model that ships with the project."""
    tp: int = 1
    """Devices of one elastic instance (tensor parallelism)."""
    num_instances: int | None = None
    """Elastic instances; None: as many as the devices make."""
    num_cpu_devices: int = CPU_NUM_DEVICES
    """Virtual devices to make when there is no GPU."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type of weights, activations and KV pool; auto: the checkpoint's, with float32 as bfloat16 on GPU."""
    page_size: int = 16
    """Tokens a page of the KV pool holds: a power of two; 1 is the paper's token granularity."""
    num_slots: int | None = None
    """Tokens that one instance's part of the KV pool holds; None: from free memory, on CPU 16384."""
    memory_fraction: float = 0.9
    """Part of each GPU's memory that weights, KV pool and workspace may take, above 0 and at most 1."""
    max_model_len: int | None = None
    """Tokens of one request, prompt and output together; None: the model's context, capped by what the pool holds."""
    max_num_seqs: int = 64
    """Requests that one master decodes at a time, and requests of one prefill."""
    max_num_batched_tokens: int = 8192
    """Tokens of one prefill on one instance; a group of n takes n times as many. Only under the policy chunked may
    prompts be longer, unless their log-probabilities are wanted or max_tokens is 0."""
    max_queue_len: int = 1024
    """Requests that may wait; one more is refused for now (HTTP 429)."""
    exchange: Literal["auto", "xla"] = "auto"
    """How GPUs exchange the small messages of a step; auto: through each other's memory where they can; xla: by XLA's
    collectives."""
    run_ahead: bool = True
    """Submit what follows a decode step or a prefill before the tokens of that are read."""
    warm_up: bool | None = None
    """Compile everything the scheduler may use before the engine is ready; None: on GPU only."""
    iteration_timeout_s: float = 600.0
    """GET /health fails while an iteration is in flight for longer than this, in seconds: choose more than the longest
    prefill takes, and on CPU its compilation; inf: never."""
    seed: int | None = None
    """Makes the seeds of requests that name none reproducible; None: fresh ones at every start."""
    compilation_cache_dir: str | None = None
    """Folder of JAX's persistent compilation cache; None: ~/.cache/loongjax/xla."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (
            "tp",
            "num_instances",
            "num_cpu_devices",
            "page_size",
            "num_slots",
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_tokens",
            "max_queue_len",
        ):
            _check_at_least_one(name, getattr(self, name))
        if self.page_size & (self.page_size - 1):
            below = 1 << (self.page_size.bit_length() - 1)
            raise ConfigError(
                f"--page-size must be a power of two, got {self.page_size}: {below} and {2 * below} are the nearest"
            )
        if self.num_slots is not None and self.num_slots % self.page_size:
            fitting = max(self.num_slots // self.page_size, 1) * self.page_size
            raise ConfigError(
                f"--num-slots must be a multiple of --page-size ({self.page_size}), got {self.num_slots}: try {fitting}"
            )
        if not 0.0 < self.memory_fraction <= 1.0:
            raise ConfigError(
                f"--memory-fraction must be above 0 and at most 1, got {self.memory_fraction}: 0.9 leaves a tenth free"
            )
        if not self.iteration_timeout_s > 0.0:
            raise ConfigError(
                f"--iteration-timeout-s must be above 0, got {self.iteration_timeout_s}: raise it, or leave it out"
            )
        if self.dtype not in ("auto", "bfloat16", "float16", "float32"):
            raise ConfigError(f"--dtype must be auto, bfloat16, float16 or float32, got {self.dtype!r}: auto fits most")
        if self.exchange not in ("auto", "xla"):
            raise ConfigError(f"--exchange must be auto or xla, got {self.exchange!r}: auto fits most")
        if self.checkpoint is not None and not pathlib.Path(self.checkpoint).is_dir():
            raise ConfigError(
                f"the checkpoint must be a folder, got {self.checkpoint!r}, which is none: give the path of a folder "
                "with config.json and safetensors"
            )


def _check_at_least_one(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise ConfigError(f"{_flag(name)} must be at least 1, got {value}: raise it, or leave it out")


def _check_choice(flag: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{flag} must be one of {', '.join(choices)}, got {value!r}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
