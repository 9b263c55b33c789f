"""How the devices of groups exchange small messages, and what becomes of exchanges that fail.

On GPUs that reach each other's memory one `PeerMemory` serves all groups: its state belongs to pairs of devices, and a
device is in one group at a time, which its programs know in one order. So groups may come and go, and run side by side.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Array, Int32, UInt32

from loongjax.config import EngineConfig
from loongjax.core.cluster import Group
from loongjax.errors import ConfigError
from loongjax.pallas_kernels.exchange import PeerMemory
from loongjax.pallas_kernels.triton_gpu import is_triton_usable
from loongjax.parallel.mesh import DeviceGrid

logger = logging.getLogger(__name__)


class GroupExchange:
    """What each group's programs need of the peer memory.

    Args:
        grid: the devices.
        memory: of all of them; None: XLA's collectives serve.
    """

    def __init__(self, grid: DeviceGrid, memory: PeerMemory | None) -> None:
        self._grid = grid
        self._memory = memory

    def peers(self, group: Group) -> UInt32[Array, "n tp 3"] | None:
        """The operand of the group's programs, the same array each time; None for XLA's collectives."""
        if self._memory is None or group.dop * self._grid.tp == 1:
            return None
        return self._memory.table(self._grid.mesh(group))

    def watch(self, statuses: Int32[Array, " n_tp"] | None) -> Callable[[], None]:
        """Takes what a program found of every device's exchanges, or None from one that had no peers.

        Returns:
            A function that waits for it, and raises JaxRuntimeError if one of them has failed.
        """
        if statuses is None:
            return lambda: None
        statuses.copy_to_host_async()

        def check() -> None:
            failures = np.asarray(statuses)
            if failures.any():
                assert self._memory is not None
                raise jax.errors.JaxRuntimeError(self._memory.describe(int(failures[failures != 0][0])))

        return check

    def reset(self, group: Group) -> None:
        """After a failed program of this group, when no other has followed: its devices begin anew with each other.

        Waits for what they have been given. Groups that share no device with this one may go on.
        """
        if self._memory is not None:
            self._memory.reset(self._grid.devices_of(group))


def make_exchange(config: EngineConfig, grid: DeviceGrid) -> GroupExchange:
    """Peer memory for the grid's devices if `config` does not forbid it and they can have it; the log says if not."""
    devices = [device for instance in grid.instances for device in instance]
    if config.exchange == "xla" or grid.platform != "gpu" or len(devices) == 1 or not is_triton_usable():
        return GroupExchange(grid, None)
    try:
        memory = PeerMemory(devices)
    except ConfigError as error:
        logger.warning("the GPUs exchange by XLA's collectives, which is slower: %s", error)
        return GroupExchange(grid, None)
    logger.info("%d GPUs exchange small messages through each other's memory", len(devices))
    return GroupExchange(grid, memory)
