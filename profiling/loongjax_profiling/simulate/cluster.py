"""The clusters that are simulated."""

from __future__ import annotations

import dataclasses

from loongjax.core.cluster import ClusterShape
from loongjax.errors import ConfigError
from loongjax.runtime.protocol import RuntimeLimits
from loongjax_profiling.simulate.config import ModelName, SimulateConfig

VOCAB_SIZE = 2
"""Token ids mean nothing in a simulation."""
MAX_PAGES = 1 << 28
"""Of all instances: their bookkeeping takes 2 GiB, and as much for the cluster as a whole."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClusterSpec:
    """Instances, their memory, and what one iteration can hold.

    Raises:
        ConfigError: a size below 1, slots that are no multiple of the page size, or more pages than can be kept.
    """

    num_instances: int
    tp: int
    """Devices of an instance."""
    num_slots: int
    """Tokens that an instance's part of the KV pool holds."""
    page_size: int = 16
    max_model_len: int | None = None
    """Tokens of a request; None: what the pool holds."""
    max_num_batched_tokens: int = 8192
    """Tokens of a prefill on one instance; a group of n takes n times as many."""
    max_num_seqs: int = 64
    """Requests of one master, and of one prefill."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and value < 1:
                raise ConfigError(f"{field.name} of a cluster must be at least 1, got {value}")
        if self.num_slots % self.page_size:
            raise ConfigError(
                f"num_slots must be a multiple of page_size ({self.page_size}), got {self.num_slots}: "
                f"try {max(1, self.num_slots // self.page_size) * self.page_size}"
            )

        num_pages = self.num_instances * (self.num_slots // self.page_size)
        if num_pages > MAX_PAGES:
            raise ConfigError(
                f"a simulated cluster has at most {MAX_PAGES} pages, got {num_pages}, {self.num_slots} slots in pages "
                f"of {self.page_size} on each of {self.num_instances} instances: lower num_slots, or raise page_size"
            )

    @property
    def shape(self) -> ClusterShape:
        return ClusterShape(
            num_instances=self.num_instances,
            num_pages=self.num_slots // self.page_size,
            page_size=self.page_size,
            tp=self.tp,
        )

    @property
    def limits(self) -> RuntimeLimits:
        """With `max_model_len` capped by what the pool holds; a policy may serve less."""
        most = self.num_slots * self.num_instances
        return RuntimeLimits(
            max_model_len=min(self.max_model_len or most, most),
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_num_seqs=self.max_num_seqs,
            vocab_size=VOCAB_SIZE,
        )

    def of_size(self, num_instances: int) -> ClusterSpec:
        """The same with so many instances."""
        return dataclasses.replace(self, num_instances=num_instances)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """A cluster, and whose memory and keys its slots come from."""

    spec: ClusterSpec
    device: str
    """Part of the name that the devices give themselves."""
    model: ModelName

    def __str__(self) -> str:
        return f"{self.device} with {self.model}"


PRESETS = {
    # The paper's: 8 GPUs of 80 GB, Llama-2-7B in float16; slots by tensor parallelism from its artifact.
    "a800-4xtp2": Preset(
        spec=ClusterSpec(num_instances=4, tp=2, num_slots=210_000, max_num_batched_tokens=210_000, max_num_seqs=1024),
        device="A800",
        model="llama2-7b",
    ),
    "a800-1xtp8": Preset(
        spec=ClusterSpec(num_instances=1, tp=8, num_slots=900_000, max_num_batched_tokens=900_000, max_num_seqs=1024),
        device="A800",
        model="llama2-7b",
    ),
    # 8 GPUs of 141 GB, Llama-3-8B in bfloat16, whose keys and values take 128 KiB a token: 0.9 of the memory without
    # the weights and 6 GB of workspace.
    "h200-8xtp1": Preset(
        spec=ClusterSpec(num_instances=8, tp=1, num_slots=800_000, max_num_batched_tokens=65_536, max_num_seqs=256),
        device="H200",
        model="llama3-8b",
    ),
}
"""Known clusters by name."""


def roofline_of(config: SimulateConfig) -> tuple[str, ModelName]:
    """The device and the model of an estimate: those that were named, or the cluster's."""
    preset = PRESETS[config.cluster]
    return config.device or preset.device, config.model or preset.model
