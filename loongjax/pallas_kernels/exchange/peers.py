"""The memory through which the GPUs of one process exchange messages."""

import ctypes
import functools
import itertools
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int32, UInt32

from loongjax.errors import ConfigError, EngineError
from loongjax.pallas_kernels.exchange.workspace import (
    BUFFER_BYTES,
    BUFFERS,
    COUNTS,
    DEFAULT_WAIT_LIMIT_S,
    MAX_DEVICES,
    MAX_PROGRAMS,
    STATUS,
    WAIT_LIMIT,
    Failure,
    workspace_bytes,
)

MOST_WAIT_LIMIT_S = 2000.0


class PeerMemory:
    """A workspace on each of some GPUs, and the table that tells programs where they are.

    It has to live as long as programs run that were given a table: they write to the workspaces behind jax's back. One
    GPU may be in only one of these at a time in a program, but any mesh over its devices can use it.

    Args:
        devices: GPUs of this process, at most 16.
        wait_limit_s: after which a wait for a peer ends and is reported, at most `MOST_WAIT_LIMIT_S`.

    Raises:
        ConfigError: a limit out of range, or devices that are no GPUs, are of several processes, or cannot all reach
            each other's memory.
    """

    def __init__(self, devices: Sequence[jax.Device], *, wait_limit_s: float = DEFAULT_WAIT_LIMIT_S) -> None:
        if not 0.0 < wait_limit_s <= MOST_WAIT_LIMIT_S:
            raise ConfigError(f"wait_limit_s must be above 0 and at most {MOST_WAIT_LIMIT_S:g}, got {wait_limit_s:g}")
        check_reachable(devices)
        self.devices = tuple(devices)
        self._tables: dict[Mesh, jax.Array] = {}
        num_words = workspace_bytes(len(devices)) // 4
        self._workspaces = [_new_workspace(num_words, math.ceil(1e6 * wait_limit_s), device) for device in devices]
        self._addresses = [workspace.unsafe_buffer_pointer() for workspace in self._workspaces]
        self.reset()

    def table(self, mesh: Mesh) -> UInt32[Array, "*mesh 3"]:
        """What the ops take as `peers` inside a `shard_map` over this mesh; the same array each time.

        For every device of the mesh, its place in `devices`, and its workspace's address: the lower half, the higher.
        Replicated over the mesh: its PartitionSpec is `P()`.

        Raises:
            ConfigError: a device that is not among `devices`.
        """
        table = self._tables.get(mesh)
        if table is None:
            if strangers := [device for device in mesh.devices.flat if device not in self.devices]:
                raise ConfigError(f"no peer memory on {strangers[0]}: make PeerMemory with all devices of any mesh")
            places = [self.devices.index(device) for device in mesh.devices.flat]
            words = [(place, *divmod(self._addresses[place], 2**32)[::-1]) for place in places]
            entries = np.array(words, np.uint32).reshape(*mesh.devices.shape, 3)
            table = self._tables[mesh] = jax.device_put(entries, NamedSharding(mesh, P()))
        return table

    def check(self) -> None:
        """Waits for all programs so far, and raises EngineError if a device gave up waiting for another in any."""
        for header in self._headers(range(len(self.devices))):
            if status := int(np.asarray(header)[STATUS // 4]):
                raise EngineError(self.describe(status))

    def describe(self, status: int) -> str:
        """What a status that is not 0 means: the status words of all devices tell of the same failure."""
        failure = Failure.from_status(status)
        return (
            f"{self.devices[failure.waiting]} gave up waiting for {self.devices[failure.missing]} "
            f"(message {failure.number} between them): all results since are void"
        )

    def reset(self, devices: Sequence[jax.Device] | None = None) -> None:
        """Begins anew between these devices, all if None, after a program over all of them has failed.

        Waits for their programs so far. Until it returns they must get no others, while those of other devices may go
        on: `workspace` says why. Tables stay as they are.
        """
        places = [self.devices.index(device) for device in (self.devices if devices is None else devices)]
        jax.block_until_ready(self._headers(places))
        for place in places:
            with _only(self.devices[place]):
                self._workspaces[place] = _forget(self._workspaces[place], tuple(sorted(places)))
            address = self._workspaces[place].unsafe_buffer_pointer()
            assert address == self._addresses[place], "donated memory has moved"
        jax.block_until_ready([self._workspaces[place] for place in places])

    def _headers(self, places: Sequence[int]) -> list[jax.Array]:
        headers = []
        for place in places:
            with _only(self.devices[place]):
                headers.append(_read_header(self._workspaces[place]))
        return headers


def check_reachable(devices: Sequence[jax.Device]) -> None:
    """Raises ConfigError unless these are GPUs of this process that can all read and write each other's memory.

    XLA opens that way for every pair that has it.
    """
    if not 0 < len(devices) <= MAX_DEVICES or len(set(devices)) < len(devices):
        raise ConfigError(f"peer memory needs 1 to {MAX_DEVICES} different devices, got {list(devices)}")
    for device in devices:
        if device.platform != "gpu":
            raise ConfigError(f"peer memory needs GPUs, got {device} of platform {device.platform!r}")
        if device.process_index != jax.process_index():
            raise ConfigError(f"peer memory needs devices of one process, got {device} of another")
    for device, peer in itertools.permutations(devices, 2):
        if not _can_access(device.local_hardware_id, peer.local_hardware_id):
            raise ConfigError(f"{device} cannot reach the memory of {peer}: peer memory needs NVLink or PCIe P2P")


@functools.cache
def _can_access(ordinal: int, peer_ordinal: int) -> bool:
    """Whether one GPU can read and write another's memory, by CUDA's driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    handles = [ctypes.c_int(), ctypes.c_int()]
    can_access = ctypes.c_int()
    results = [driver.cuInit(0)]
    results += [driver.cuDeviceGet(ctypes.byref(h), o) for h, o in zip(handles, (ordinal, peer_ordinal), strict=True)]
    results.append(driver.cuDeviceCanAccessPeer(ctypes.byref(can_access), *handles))
    return not any(results) and bool(can_access.value)


@functools.partial(jax.jit, static_argnums=0)
def _zeros_with_limit(num_words: int, wait_limit_us: Int32[Array, ""]) -> Int32[Array, "words"]:
    return jnp.zeros(num_words, jnp.int32).at[WAIT_LIMIT // 4].set(wait_limit_us)


def _new_workspace(num_words: int, wait_limit_us: int, device: jax.Device) -> Int32[Array, "words"]:
    with _only(device):
        return _zeros_with_limit(num_words, jax.device_put(np.int32(wait_limit_us), device))


def _only(device: jax.Device) -> AbstractContextManager[Any]:
    """For programs of one device, whatever mesh is in use."""
    return jax.set_mesh(Mesh(np.array([device]), ("device",)))


@functools.partial(jax.jit, static_argnums=1, donate_argnums=0)
def _forget(workspace: Int32[Array, "words"], places: tuple[int, ...]) -> Int32[Array, "words"]:
    """The same memory, with no status, and as if no message had been exchanged with the devices in these places. What
    is of others is not touched. Donates it.
    """
    workspace = workspace.at[STATUS // 4].set(0)
    for begin, num_words in ((COUNTS // 4, MAX_PROGRAMS), (BUFFERS // 4, MAX_PROGRAMS * 2 * BUFFER_BYTES // 4)):
        for place in places:
            zeros = jnp.zeros(num_words, jnp.int32)
            workspace = jax.lax.dynamic_update_slice(workspace, zeros, (begin + place * num_words,))
    return workspace


@jax.jit
def _read_header(workspace: Int32[Array, "words"]) -> Int32[Array, "header"]:
    """As it is now: what jax has copied to the host before may be older."""
    return workspace[: WAIT_LIMIT // 4 + 1]
