"""Continuous batching as in vLLM 0.3: one engine, in which prefills go first while there is memory."""

from __future__ import annotations

from loongjax.core.cluster import ClusterShape
from loongjax.errors import ConfigError
from loongjax.scheduler.baselines.batching_config import BatchingConfig
from loongjax.scheduler.baselines.static import StaticPolicy

PREFILL_FIRST = BatchingConfig(reserves_max_tokens=False, watermark=0.01)
"""vLLM's watermark."""


class PrefillFirstPolicy(StaticPolicy):
    """One instance of all devices, on which waiting prompts are prefilled before anybody gets a next token.

    A prompt is let in if its keys fit and a hundredth of the pool stays free. If a next token finds no page, the newest
    request is preempted and recomputed later.

    Raises:
        ConfigError: several instances.
    """

    def __init__(self, shape: ClusterShape, config: BatchingConfig = PREFILL_FIRST) -> None:
        if shape.num_instances != 1:
            num_devices = shape.num_instances * shape.tp
            raise ConfigError(
                f"the policy prefill-first runs one instance of all devices, got {shape.num_instances} instances of "
                f"tp={shape.tp}: give --num-instances 1 --tp {num_devices}"
            )
        super().__init__(shape, config)
