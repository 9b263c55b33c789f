"""What `loongjax simulate` is told."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Literal

from loongjax.config import SchedulingConfig
from loongjax.errors import ConfigError
from loongjax_profiling.simulate.workload.config import WorkloadConfig

ClusterName = Literal["a800-4xtp2", "a800-1xtp8", "h200-8xtp1"]
ModelName = Literal["llama2-7b", "llama3-8b"]
A800 = "a800"
"""The cost model that comes with the simulator, instead of a file's path."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimulateConfig(WorkloadConfig, SchedulingConfig):
    """A workload on a simulated cluster: the engine and its scheduler as they are, on a virtual clock.

    `loongjax simulate paper-zipf` and `loongjax simulate paper-datasets` compare policies as in the paper's evaluation.

    Raises:
        ConfigError: settings that cannot work.
    """

    cost_model: str | None = None
    """File with the times of iterations, as `loongjax fit` writes it, or "a800": coefficients from the times that
    LoongServe's authors published; None: a roofline of `device` and `model`."""
    device: str | None = None
    """Whose rates the roofline takes, H200, H100, A100 or A800; None: the cluster's."""
    model: ModelName | None = None
    """Whose shape the roofline takes; None: the one that the cluster's memory was divided for."""
    cluster: ClusterName = "a800-4xtp2"
    """Device, instances x GPUs of each, with their memory and limits; the flags below change them one by one."""
    num_instances: int | None = None
    """Elastic instances."""
    tp: int | None = None
    """GPUs of an instance."""
    num_slots: int | None = None
    """Tokens that one instance's part of the KV pool holds."""
    page_size: int | None = None
    """Tokens of a page of the KV pool."""
    max_model_len: int | None = None
    """Tokens of a request, prompt and output together; None: what fits."""
    max_num_batched_tokens: int | None = None
    """Tokens of one prefill on one instance; a group of n takes n times as many. Only under the policy chunked may
    prompts be longer."""
    max_num_seqs: int | None = None
    """Requests that one master decodes at a time, and requests of one prefill."""
    pod_size: int = 16
    """Instances that one scheduler looks after; a router splits larger clusters."""
    host: pathlib.Path | None = None
    """File comparison.json of a `loongjax replay`: what the host of that engine adds to the times of iterations; None:
    nothing."""
    run_ahead: bool = False
    """Submit iterations before those before them have ended, as a real engine does: who comes then waits for one step
    more, and the host makes the next one ready meanwhile. Slow, for it goes step by step."""
    step_by_step: bool = False
    """Ask the policy after every single decode step: the same result, slowly."""
    timeline_s: float = 120.0
    """Seconds of the middle of the simulation to draw; 0: no picture."""
    out: pathlib.Path = pathlib.Path("simulation")
    """Folder for records.jsonl, metrics.json and timeline.png."""

    def __post_init__(self) -> None:
        WorkloadConfig.__post_init__(self)
        SchedulingConfig.__post_init__(self)
        if not self.timeline_s >= 0.0:
            raise ConfigError(f"--timeline-s must be at least 0, got {self.timeline_s}: 0 draws nothing")
