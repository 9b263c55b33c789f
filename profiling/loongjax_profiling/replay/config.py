"""What `loongjax replay` is told."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Annotated, ClassVar, Literal

import tyro

from loongjax.config import EngineConfig
from loongjax.errors import ConfigError
from loongjax_profiling.simulate.workload.config import WorkloadConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplayConfig(WorkloadConfig, EngineConfig):
    """Plays a workload on the real engine in real time, simulates the same one, and compares the two.

    The engine is this machine's, with the model, the policy and the limits given here; the simulation gets its shape,
    and its times from --cost-model. Prompts are random token ids, and outputs are as long as the workload says.

    Raises:
        ConfigError: settings that cannot work.
    """

    USUAL_NUM_REQUESTS: ClassVar[int] = 60

    random_weights: Literal["llama2-7b", "llama3-8b", "tiny"] | None = None
    """Random weights of this shape instead of a checkpoint's."""
    cost_model: str | None = None
    """File with the times of iterations, as `loongjax fit` writes it, for the simulation and for the policy esp; None:
    a roofline estimate for the devices."""
    warm_up: bool | None = None
    """Build before the clock starts what requests may need; None: only what these ones may need."""
    max_queue_len: int = 1 << 20
    """Requests that may wait; one more is refused."""
    num_requests: int | None = None
    """How many requests come, of a trace the first so many; None: 60, of a trace all."""
    num_calibration_requests: int = 40
    """Requests of another seed that are played first, to measure by how much the cost model's times are off here, and
    what the host adds to them; 0: the simulation takes the model as it is, and the host to add nothing."""
    seed: int = 0
    """Of lengths, arrivals and token ids."""
    limit_s: float | None = None
    """Ends the replay after so many seconds of it, and the calibration before it likewise; what has ended by then is
    compared. None: it ends with its last request."""
    out: pathlib.Path = pathlib.Path("replay")
    """Folder for the records of both sides, the iterations of the engine, and comparison.json."""
    commit: Annotated[str | None, tyro.conf.arg(metavar="SHA")] = None
    """Of this code, to be stored; None: git is asked."""

    def __post_init__(self) -> None:
        WorkloadConfig.__post_init__(self)
        EngineConfig.__post_init__(self)
        if self.checkpoint is not None and self.random_weights is not None:
            raise ConfigError("a checkpoint and --random-weights are two models: give one of them")
        if self.num_calibration_requests < 0:
            raise ConfigError(
                f"--num-calibration-requests must be at least 0, got {self.num_calibration_requests}: 0 is for none"
            )
        if self.limit_s is not None and not self.limit_s > 0.0:
            raise ConfigError(f"--limit-s must be above 0, got {self.limit_s}: leave it out for all requests")
