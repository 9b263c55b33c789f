"""Runs a Triton kernel's body on the CPU, on numpy arrays, one program after another.

Only in a process with TRITON_INTERPRET=1, which Triton reads once. Its interpreter wants arguments like torch's
tensors: `_Tensor` has as much of them as it asks for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from triton.runtime import interpreter


class _Storage:
    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def cpu(self) -> _Storage:
        return self

    def copy_(self, other: _Storage) -> None:
        assert other.array is self.array


class _Tensor:
    def __init__(self, array: np.ndarray | None, dtype: np.dtype) -> None:
        self._array = array
        self.dtype = dtype

    def data_ptr(self) -> int:
        assert self._array is not None
        return self._array.ctypes.data

    def untyped_storage(self) -> _Storage:
        assert self._array is not None
        if not hasattr(self, "_storage"):
            self._storage = _Storage(self._array)
        return self._storage

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return () if self._array is None else self._array.shape

    def stride(self) -> tuple[int, ...]:
        return ()

    def new_empty(self, size: int, device: str) -> _Tensor:
        return _Tensor(None, self.dtype)

    def set_(self, storage: _Storage, offset: int, size: Any, stride: Any) -> None:
        self._array = storage.array
        self._storage = storage


def _patch_index(tensor: type, scope: Any, patch: Callable[[type, Any], None] = interpreter._patch_lang_tensor) -> None:
    """numpy no longer makes an int of an array of one element, as Triton's own `__index__` does."""
    patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _patch_first_of_a_module(function: Any, patch: Callable[[Any], Any] = interpreter._patch_lang) -> Any:
    """Triton patches its language anew at every call of every function, which takes a third of the time."""
    if function.__module__ not in _patched:  # by the names under which a module has the language
        _patched.add(function.__module__)
        patch(function)
    return interpreter._LangPatchScope()


_patched: set[str] = set()
interpreter._patch_lang_tensor = _patch_index
interpreter._patch_lang = _patch_first_of_a_module


def interpret(kernel: Any, grid: tuple[int, ...], *arguments: np.ndarray | int, **constants: Any) -> None:
    """Runs every program of `kernel`, a `triton.jit` function; arrays are read and written in place."""
    wrapped = [_Tensor(value, value.dtype) if isinstance(value, np.ndarray) else value for value in arguments]
    kernel[grid](*wrapped, **constants)
