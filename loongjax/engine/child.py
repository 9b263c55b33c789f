"""The engine's side of `loongjax serve`, as its process starts it."""

from __future__ import annotations

import dataclasses
import gc
import logging
import sys
import threading
from typing import TYPE_CHECKING

from tqdm import tqdm

from loongjax.config import EngineConfig
from loongjax.engine.thread_switches import SWITCH_INTERVAL_S

if TYPE_CHECKING:
    from loongjax.engine.core import EngineCore

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


@dataclasses.dataclass(frozen=True)
class CoreFactory:
    """Builds a step loop in a process of its own. Picklable, and loads JAX only when it is called."""

    config: EngineConfig
    log_level: str = "info"

    def __call__(self) -> EngineCore:
        logging.basicConfig(level=self.log_level.upper(), format=LOG_FORMAT)
        logging.getLogger("jax").setLevel(logging.WARNING)  # it tells at INFO which back ends are not there
        logging.getLogger("absl").setLevel(logging.WARNING)  # Orbax tells through it what it does when
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        # Without this, progress bars make a lock for several processes: a semaphore that is left behind if this process
        # is ended by force.
        tqdm.set_lock(threading.RLock())
        from loongjax.engine.build import build_core  # here: the parent never needs JAX

        core = build_core(self.config)
        # Nothing of JAX or the model will ever be garbage. Looking at all of it, some 200,000 objects, holds the step
        # loop up for a tenth of a second.
        gc.collect()
        gc.freeze()
        return core
