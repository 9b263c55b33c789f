"""Reading slices of the tensors of safetensors files, without ever mapping or holding a whole file.

A file is an 8-byte little-endian length, a JSON header of that length, and the tensors' bytes, row-major, little-endian
(https://huggingface.co/docs/safetensors, "Format").
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import ml_dtypes
import numpy as np

from loongjax.errors import CheckpointError

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""Dtypes that a weight may have."""

_MAX_HEADER_BYTES = 100 << 20
_CHUNK_BYTES = 16 << 20


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """What the header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    """Offset in the file, in bytes."""
    end: int


class SafetensorsFile:
    """An open file: a context manager.

    Raises:
        CheckpointError: the file is missing, cut short, or not a safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise CheckpointError(f"{path} cannot be opened: {error.strerror}") from None
        try:
            self.tensors = self._read_header()
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)

    def read_rows(self, name: str, begin: int = 0, end: int | None = None) -> np.ndarray:
        """Rows [begin, end) of a tensor, all of it by default, in the tensor's dtype."""
        info, dtype = self.tensors[name], self.dtype(name)
        end = info.shape[0] if end is None else end
        out = np.empty((end - begin, *info.shape[1:]), dtype)
        self._read_into(out, info.begin + begin * math.prod(info.shape[1:]) * dtype.itemsize, name)
        return out

    def read_columns(self, name: str, num_parts: int) -> list[np.ndarray]:
        """A matrix cut into equal parts of its columns, in one pass over the file.

        Besides the parts, it needs memory for one chunk of rows.
        """
        (num_rows, num_columns), dtype = self.tensors[name].shape, self.dtype(name)
        width, row_bytes = num_columns // num_parts, num_columns * dtype.itemsize
        parts = [np.empty((num_rows, width), dtype) for _ in range(num_parts)]
        chunk_rows = max(1, _CHUNK_BYTES // row_bytes)
        for row in range(0, num_rows, chunk_rows):
            chunk = np.empty((min(chunk_rows, num_rows - row), num_columns), dtype)
            self._read_into(chunk, self.tensors[name].begin + row * row_bytes, name)
            for rank, part in enumerate(parts):
                part[row : row + chunk_rows] = chunk[:, rank * width : (rank + 1) * width]
        return parts

    def map(self, name: str) -> np.ndarray:
        """The tensor as a read-only view of the file, for those who go through it once."""
        info = self.tensors[name]
        if 0 in info.shape:
            return np.empty(info.shape, self.dtype(name))
        return np.memmap(self.path, self.dtype(name), mode="r", offset=info.begin, shape=info.shape)

    def dtype(self, name: str) -> np.dtype:
        """The tensor's dtype. Raises CheckpointError if no weight may have it."""
        code = self.tensors[name].dtype
        if code not in DTYPES:
            supported = ", ".join(DTYPES)
            raise CheckpointError(f"{self.path}: tensor {name} has dtype {code}; those supported: {supported}")
        return DTYPES[code]

    def _read_into(self, out: np.ndarray, offset: int, name: str) -> None:
        buffer = memoryview(out.reshape(-1).view(np.uint8))
        while len(buffer):
            try:
                num_bytes = os.preadv(self._file, [buffer], offset)
            except OSError as error:
                raise CheckpointError(f"{self.path}: tensor {name} cannot be read: {error.strerror}") from None
            if num_bytes == 0:
                raise CheckpointError(f"{self.path} was cut short while tensor {name} was read")
            buffer, offset = buffer[num_bytes:], offset + num_bytes

    def _read_header(self) -> dict[str, TensorInfo]:
        size = os.fstat(self._file).st_size
        header_bytes = int.from_bytes(os.pread(self._file, 8, 0), "little")
        if size < 8 or header_bytes > _MAX_HEADER_BYTES:
            raise CheckpointError(f"{self.path} is not a safetensors file ({size} bytes, header of {header_bytes})")
        if size < 8 + header_bytes:
            raise CheckpointError(f"{self.path} is cut short: {size} bytes, the header alone needs {8 + header_bytes}")
        try:
            header = json.loads(os.pread(self._file, header_bytes, 8))
            tensors = {
                name: _tensor_info(raw, 8 + header_bytes) for name, raw in header.items() if name != "__metadata__"
            }
        except (ValueError, TypeError, KeyError, AttributeError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{self.path} is not a safetensors file: bad header ({error})") from None
        for name, info in tensors.items():
            if info.end > size:
                raise CheckpointError(
                    f"{self.path} is cut short: {size} bytes, but tensor {name} ends at byte {info.end}; "
                    "download it again"
                )
        return tensors


def _tensor_info(raw: Any, data_offset: int) -> TensorInfo:
    begin, end = (int(offset) for offset in raw["data_offsets"])
    info = TensorInfo(
        str(raw["dtype"]), tuple(int(size) for size in raw["shape"]), begin + data_offset, end + data_offset
    )
    if begin < 0 or any(size < 0 for size in info.shape):
        raise ValueError(f"negative offset or size in {raw}")
    dtype = DTYPES.get(info.dtype)
    if dtype is not None and end - begin != math.prod(info.shape) * dtype.itemsize:
        raise ValueError(f"{end - begin} bytes for {info.dtype} of shape {list(info.shape)}")
    return info
