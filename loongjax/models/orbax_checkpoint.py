"""Converted checkpoints: weights as Orbax arrays, which any number of devices can read in parallel, each its own part.

A converted checkpoint is a folder with the config and tokenizer files of the one it was made from, and `weights/`: an
Orbax checkpoint of {Hugging Face tensor name: array}, unpadded, in the dtype they had.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import tempfile
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import jax

from loongjax.errors import CheckpointError, ConfigError
from loongjax.models.checkpoint_files import INDEX_FILE, check_tensors, open_tensors, tensor_shapes
from loongjax.models.config import ModelConfig

WEIGHTS_FOLDER = "weights"

_COPIED_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".md")
_CHUNK_BYTES = 16 << 20
"""Of one stored piece: what a device reads at least."""
_CONCURRENT_BYTES = 1 << 30
"""Of host memory that one load or save may fill, unless one tensor needs more."""


def convert(checkpoint_dir: Path | str, out_dir: Path | str) -> None:
    """Writes a Hugging Face checkpoint again as a converted one.

    Args:
        checkpoint_dir: a folder with config.json and safetensors.
        out_dir: is made; may exist if it is empty.

    Raises:
        CheckpointError: the checkpoint cannot be read or does not fit its configuration.
        ConfigError: `out_dir` holds something, or cannot be written to.
    """
    source, target = Path(checkpoint_dir), Path(out_dir)
    config = ModelConfig.from_checkpoint(source)
    with _writing_to(target):
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ConfigError(f"{target} exists and is no empty folder; give one that does not exist")
    if is_converted(source):
        raise CheckpointError(f"{source} is a converted checkpoint already")
    from orbax.checkpoint import v1 as ocp

    with open_tensors(source, config) as files:
        with _writing_to(target):
            target.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=target).close()
        tensors = {name: files[name].map(name) for name in tensor_shapes(config)}
        with _context(max(tensor.nbytes for tensor in tensors.values())):
            ocp.save(str((target / WEIGHTS_FOLDER).absolute()), tensors)
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix in _COPIED_SUFFIXES and path.name != INDEX_FILE:
            shutil.copyfile(path, target / path.name)


@contextlib.contextmanager
def _writing_to(folder: Path) -> Generator[None, None, None]:
    """Says in words that a folder cannot be written to."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be written to ({error.strerror}): give a folder in one that you may write to"
        ) from error


def is_converted(checkpoint_dir: Path) -> bool:
    """Whether a folder is a converted checkpoint, by what is in it."""
    return (checkpoint_dir / WEIGHTS_FOLDER / "orbax.checkpoint").exists()


def read(checkpoint_dir: Path, config: ModelConfig, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Tensors by name, with the shape, dtype and sharding wanted; rows beyond those stored are zeros.

    Raises:
        CheckpointError: the stored tensors are not those of `config`, or cannot be read.
    """
    from orbax.checkpoint import v1 as ocp

    folder = (checkpoint_dir / WEIGHTS_FOLDER).absolute()
    try:
        stored: Any = ocp.metadata(str(folder)).metadata
    except Exception as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from error
    if not isinstance(stored, Mapping):
        raise CheckpointError(f"{folder} does not hold tensors by name")
    check_tensors(checkpoint_dir, config, {name: tuple(tensor.shape) for name, tensor in stored.items()})
    try:
        with _context(max(math.prod(tensor.shape) * 4 for tensor in wanted.values())):
            arrays: Any = ocp.load(str(folder), dict(wanted))
    except Exception as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from error
    return arrays


def _context(largest_bytes: int) -> Any:
    """Options for saving and loading tensors of which the largest has so many bytes."""
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    context.array.saving.storage_options.chunk_byte_size = _CHUNK_BYTES
    context.array.loading.enable_padding_and_truncation = True
    context.memory.read_concurrent_bytes = max(_CONCURRENT_BYTES, largest_bytes)
    context.memory.write_concurrent_bytes = max(_CONCURRENT_BYTES, largest_bytes)
    context.memory.deepcopy_host_arrays = False  # they are views of files that nobody writes
    return context
