"""Runs Mosaic GPU kernels that feed wgmma from registers on the CPU, thread blocks, barriers and copies included.

jax's own interpreter (`InterpretGPUParams`) takes wgmma operands in shared memory only, knows no stores to
accumulators or words that thread blocks share, and wants every barrier waited for to its last phase. The public API has
no way to add the first ones or to leave out the last, hence the private imports. What speaks of single threads stands
here in plain jax.
"""

import functools
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Self
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.pallas.mosaic_gpu import primitives
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret, shared_memory
from jax._src.state.types import AbstractRef
from jax.experimental import io_callback
from jax.experimental.pallas import mosaic_gpu as plgpu

from loongjax.pallas_kernels.prefill_attention import mosaic_gpu_kernel, mosaic_gpu_pace

(INTERPRETER,) = (x for x in vars(jaxpr_interpret).values() if hasattr(x, "_interpret_wgmma_ref_p"))
interpret_wgmma_of_references = INTERPRETER._interpret_wgmma_ref_p


@contextmanager
def interpreted(*, detect_races: bool = False) -> Iterator[None]:
    """Kernels traced inside run on the CPU. With `detect_races`, unordered accesses to shared memory raise."""
    known = types.SimpleNamespace(**vars(primitives))
    known.wgmma_ref_p = _Either(primitives.wgmma_ref_p, primitives.wgmma_accumulator_store_p)
    with (
        mock.patch.multiple(
            mosaic_gpu_kernel, scale_rows=_scale_rows, sum_parts=_sum_parts, hide_outside=_hide_outside
        ),
        mock.patch.multiple(
            mosaic_gpu_pace,
            shared_count=SharedCount,
            count=SharedCount.add,
            read=SharedCount.read,
            any_thread=lambda holds: holds,
        ),
        mock.patch.object(jaxpr_interpret, "gpu_primitives", known),
        mock.patch.object(INTERPRETER, "_interpret_wgmma_ref_p", _interpret),
        mock.patch.object(shared_memory.Barrier, "deallocate", _deallocate),
        plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=detect_races)),
    ):
        yield


class SharedCount:
    """As `mosaic_gpu_pace.shared_count`, on the host; made when a kernel is traced, for its next run."""

    made: ClassVar[list[Self]] = []

    def __init__(self) -> None:
        self.value = 0
        self.num_adds = 0
        self.num_reads = 0
        self.made.append(self)

    def add(self, amount: jax.Array) -> None:
        io_callback(self._add, (), amount, ordered=True)

    def _add(self, amount: np.ndarray) -> tuple[()]:
        self.num_adds += 1
        self.value += int(amount)
        return ()

    def read(self) -> jax.Array:
        return io_callback(self._read, jax.ShapeDtypeStruct((), jnp.int32), ordered=True)

    def _read(self) -> np.ndarray:
        self.num_reads += 1
        return np.array(self.value, np.int32)


def _scale_rows(tile: jax.Array, factor: jax.Array) -> jax.Array:
    return tile * factor[:, None]


def _sum_parts(tile: jax.Array) -> jax.Array:
    return tile.reshape(tile.shape[0], -1, 8).sum(axis=1)


def _hide_outside(tile: jax.Array, begin: jax.Array, end: jax.Array) -> jax.Array:
    column = jnp.arange(tile.shape[1])[None, :]
    return jnp.where((column >= begin[:, None]) & (column < end[:, None]), tile, -jnp.inf)


class _Either:
    """Equal to each of these, as the interpreter's `match` asks."""

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __init__(self, *primitives: object) -> None:
        self._primitives = primitives

    def __eq__(self, other: object) -> bool:
        return any(other is primitive for primitive in self._primitives)


def _interpret(self: Any, equation: Any, token: jax.Array, get_operands: Callable[[], Sequence[Any]]) -> Any:
    update = functools.partial(io_callback, result_shape_dtypes=gpu_callbacks.TOKEN_SHAPE_DTYPE)
    if equation.primitive is primitives.wgmma_accumulator_store_p:
        accumulator, value = get_operands()
        return update(_store, token=token, thread=self.thread, accumulator=accumulator, value=value), value
    if isinstance(equation.invars[1].aval, AbstractRef):
        with mock.patch.object(jaxpr_interpret, "gpu_primitives", primitives):
            return interpret_wgmma_of_references(self, equation, token, get_operands)
    accumulator, a, b, *leaves = get_operands()
    transforms = jax.tree.unflatten(equation.params["b_transforms_tree"], leaves)
    b, transforms = jaxpr_interpret.resolve_ref(equation.invars[2].aval, b, transforms)
    operands = {"accumulator": accumulator, "a": a, "b": b, "transforms": transforms}
    return update(_multiply, token=token, thread=self.thread, **operands), []


def _store(*, token: Any, thread: Any, accumulator: Any, value: Any) -> Any:
    memory = gpu_callbacks._get_shared_memory()
    key = _key_of(accumulator)
    memory.store_buffer_content(key, memory.access(key, ()), np.asarray(value, np.float32), thread)
    return token


def _multiply(*, token: Any, thread: Any, accumulator: Any, a: Any, b: Any, transforms: Any) -> Any:
    memory = gpu_callbacks._get_shared_memory()
    key, b_key = _key_of(accumulator), _key_of(b)
    transforms = jax.tree.map(int, gpu_callbacks._remove_noop_transforms(transforms))
    values = memory.get_buffer_content(b_key, memory.access(b_key, transforms), thread)[0]
    before: Any = memory.get_buffer_content(key, memory.access(key, ()), thread)[0]
    product = np.asarray(a).astype(np.float32) @ np.asarray(values).astype(np.float32)
    return _store(token=token, thread=thread, accumulator=accumulator, value=before + product)


def _key_of(reference: Any) -> Any:
    return vars(gpu_callbacks)["HostAllocationKey"].from_array(reference)


def _deallocate(self: Any) -> None:
    # A kernel may end with arrivals that nobody waits for.
    with self.cv:
        self.ref_count -= 1
