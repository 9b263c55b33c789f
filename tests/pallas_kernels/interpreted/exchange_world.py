"""Devices that exchange messages, each a process of its own, since Triton's interpreter runs one kernel a process.

Their workspaces lie in shared memory, mapped by every process at addresses of its own.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any, NamedTuple

import numpy as np
import triton.language as tl
from numpy.typing import DTypeLike

from loongjax.pallas_kernels.exchange import kernels, workspace
from loongjax.pallas_kernels.exchange.kernels import gather_kernel, merge_kernel, reduce_kernel, status_kernel
from tests.pallas_kernels.triton_interpreter import interpret

POLL_SECONDS = 2e-4
"""Between two polls."""

PATIENT_US = 60_000_000
"""A wait of a minute."""


class Cut(NamedTuple):
    """How a message is cut: items of a chunk, programs, rounds."""

    block: int
    programs: int
    num_rounds: int


class Device:
    """One device's view of the workspaces of all."""

    def __init__(self, place: int, memory: np.ndarray) -> None:
        self.place = place
        self.memory = memory
        """uint8 [devices, bytes]"""

    def header(self, offset: int) -> np.ndarray:
        """An int32 of this device's workspace, to read and write."""
        return self.memory[self.place, offset : offset + 4].view(np.int32)

    @property
    def status(self) -> int:
        return int(self.header(workspace.STATUS)[0])

    def set_numbers(self, count: int) -> None:
        """As if so many messages had been exchanged on every channel."""
        self.memory[self.place, workspace.COUNTS : workspace.BUFFERS].view(np.int32)[:] = count

    def group(self, members: Sequence[int]) -> np.ndarray:
        """What the kernels take as a group of these devices, in this order."""
        addresses = [self.memory[member].ctypes.data for member in members]
        entries = [
            (rank, member, address % 2**32, address // 2**32)
            for rank, (member, address) in enumerate(zip(members, addresses, strict=True))
        ]
        rank = members.index(self.place)
        return np.array(entries + entries[rank:] + entries[:rank], np.uint32)

    def all_reduce(self, x: np.ndarray, members: Sequence[int], cut: Cut) -> np.ndarray:
        out = np.full(x.shape, np.nan, x.dtype)
        self._run(reduce_kernel, members, cut, x, self.group(members), out, size=x.size)
        return out

    def all_gather(self, x: np.ndarray, members: Sequence[int], cut: Cut) -> np.ndarray:
        out = np.zeros((len(members), *x.shape), x.dtype)
        self._run(gather_kernel, members, cut, x, self.group(members), out, size=x.size)
        return out

    def exchange_and_merge(
        self,
        o: np.ndarray,
        lse: np.ndarray,
        members: Sequence[int],
        cut: Cut,
        out_dtype: DTypeLike = np.float32,
    ) -> tuple[np.ndarray, np.ndarray]:
        _, num_rows, head_dim = o.shape
        merged = np.full((num_rows, head_dim), np.nan, out_dtype), np.full(num_rows, np.nan, np.float32)
        shape = {
            "num_rows": num_rows,
            "head_dim": head_dim,
            "padded_dim": 1 << (head_dim - 1).bit_length(),
            "copies": 4,
        }
        self._run(merge_kernel, members, cut, o, lse, self.group(members), *merged, **shape)
        return merged

    def read_status(self, members: Sequence[int]) -> int:
        out = np.full(1, -1, np.int32)
        interpret(status_kernel, (1,), np.zeros(1, np.float32), self.group(members), out, num_ranks=len(members))
        return int(out[0])

    def _run(self, kernel: Any, members: Sequence[int], cut: Cut, *arguments: np.ndarray, **shape: int) -> None:
        cut_by = {"block": cut.block, "num_rounds": cut.num_rounds}
        interpret(kernel, (cut.programs,), *arguments, num_ranks=len(members), **shape, **cut_by)


def map_workspaces(path: str, num_devices: int) -> np.ndarray:
    """uint8 [devices, bytes], shared with all who map the file."""
    shape = (num_devices, workspace.workspace_bytes(num_devices))
    return np.asarray(np.memmap(path, np.uint8, "r+", shape=shape))


@contextlib.contextmanager
def new_workspaces(num_devices: int, wait_limit_us: int = PATIENT_US) -> Iterator[str]:
    """A file to map: zeros, most of it a hole, but for the limits of waits."""
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(num_devices * workspace.workspace_bytes(num_devices))
        memory = map_workspaces(file.name, num_devices)
        memory[:, workspace.WAIT_LIMIT : workspace.WAIT_LIMIT + 4].view(np.int32)[:] = wait_limit_us
        yield file.name


class World:
    """Processes that stand for devices; made once, since importing takes them seconds."""

    def __init__(self, num_devices: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._ends: list[Connection] = []
        self._processes: list[SpawnProcess] = []
        for place in range(num_devices):
            end, other = context.Pipe()
            process = context.Process(target=_serve, args=(place, num_devices, other), daemon=True)
            process.start()
            self._ends.append(end)
            self._processes.append(process)

    def run(
        self, act: Callable[..., None], *arguments: Any, prepare: Callable[[np.ndarray], None] | None = None
    ) -> None:
        """Does `act(device, *arguments)` on all devices at once, on workspaces that only `prepare` has touched."""
        with new_workspaces(len(self._ends)) as path:
            if prepare is not None:
                prepare(map_workspaces(path, len(self._ends)))
            for end in self._ends:
                end.send((path, act, arguments))
            failures = [failure for end in self._ends if (failure := end.recv())]
        assert not failures, "\n".join(failures)

    def close(self) -> None:
        for end in self._ends:
            end.send(None)
        for process in self._processes:
            process.join()


def _serve(place: int, num_devices: int, end: Connection) -> None:
    _yield_while_polling()
    kernels.clock_us = lambda: time_of(time.monotonic_ns() // 1000)  # pyright: ignore[reportAttributeAccessIssue]
    while (task := end.recv()) is not None:
        path, act, arguments = task
        try:
            act(Device(place, map_workspaces(path, num_devices)), *arguments)
        except Exception:
            end.send(f"on device {place}: {traceback.format_exc()}")
        else:
            end.send(None)


def time_of(microseconds: int) -> Any:
    """In a kernel, what its clock gives."""
    return tl.full([], microseconds, tl.int64)


def _yield_while_polling() -> None:
    """Devices outnumber processors here: one that waits lets others work."""
    poll: Any = kernels.poll

    def yielding(*arguments: Any) -> Any:
        words, state = poll(*arguments)
        if int(state) == kernels.MISSING:
            time.sleep(POLL_SECONDS)
        return words, state

    kernels.poll = yielding  # pyright: ignore[reportAttributeAccessIssue]
