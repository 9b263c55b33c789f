"""Weights from a Hugging Face checkpoint, or random ones, straight to the devices that need them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from loongjax.models import orbax_checkpoint
from loongjax.models.checkpoint_files import open_tensors
from loongjax.models.config import ModelConfig
from loongjax.models.safetensors_file import SafetensorsFile
from loongjax.models.sharding import (
    TP_AXIS,
    ParamPath,
    abstract_params,
    param_paths,
    partition_spec,
    split_dim,
    tensor_name,
)

Devices = Sequence[Sequence[jax.Device]]  # pyright: ignore[reportInvalidTypeForm] (jax hides that it is a class)
"""By instance, then by tensor-parallel rank; every instance has as many."""

InstanceWeights = list[list[nnx.State]]
"""Local shards by instance and tensor-parallel rank, in the structure of `nnx.state(model, nnx.Param)`, each array
whole on one device."""


def load_weights(checkpoint_dir: Path | str, config: ModelConfig, *, dtype: Any, devices: Devices) -> InstanceWeights:
    """Reads a checkpoint, and of each tensor only the slices that a device needs.

    From safetensors, host memory grows by at most three tensors; on the CPU backend the weights themselves live there
    too. Instances after the first get their replicas from its devices.

    Args:
        checkpoint_dir: a folder with model.safetensors, or an index and its files, or a converted checkpoint.
        config: of that checkpoint.
        dtype: that the weights will have.
        devices: where they go.

    Raises:
        CheckpointError: naming the file or tensor that is missing, left over, misshapen or cut short.
        ConfigError: the model cannot be cut over that many devices.
    """
    folder = Path(checkpoint_dir)
    params = abstract_params(config, dtype=dtype, tp=_tp_of(devices))
    if orbax_checkpoint.is_converted(folder):
        placed = _load_converted(folder, config, params, devices)
    else:
        placed = _load_safetensors(folder, config, params, devices)
    return _states(jax.tree.structure(params), placed, devices)


def random_weights(config: ModelConfig, *, dtype: Any, devices: Devices, seed: int) -> InstanceWeights:
    """Random weights made on the devices, scaled so that activations and logits stay of order one.

    They depend on the seed, not on the number of devices. Arguments and errors as `load_weights`.
    """
    tp = _tp_of(devices)
    params = abstract_params(config, dtype=dtype, tp=tp)
    mesh = jax.sharding.Mesh(np.array(devices[0]), (TP_AXIS,))
    placed = []
    for index, (path, param) in enumerate(zip(param_paths(params), jax.tree.leaves(params), strict=True)):
        sharding = jax.sharding.NamedSharding(mesh, partition_spec(path))
        array = _random_param(path, param, jax.random.fold_in(jax.random.key(seed), index), sharding)
        placed.append(_replicate(_shards_of(array, devices), devices))
    return _states(jax.tree.structure(params), placed, devices)


def _load_safetensors(
    folder: Path, config: ModelConfig, params: nnx.State, devices: Devices
) -> list[list[list[jax.Array]]]:
    """Shards by parameter, instance and rank, read tensor by tensor."""
    paths, abstract = param_paths(params), jax.tree.leaves(params)
    placed: list[list[list[jax.Array]]] = [[] for _ in paths]
    previous: list[list[jax.Array]] = []
    with open_tensors(folder, config) as files:
        order = sorted(range(len(paths)), key=lambda i: _place(files, tensor_name(paths[i])))
        for i in tqdm(order, desc="Loading weights", unit="tensor", disable=None):
            shards = _host_shards(files[tensor_name(paths[i])], paths[i], abstract[i].shape, len(devices[0]))
            # The devices cast: it is faster there, and rounds the same.
            by_rank = [
                jax.device_put(shard, device).astype(abstract[i].dtype)
                for shard, device in zip(shards, devices[0], strict=True)
            ]
            placed[i] = _replicate(by_rank, devices)
            jax.block_until_ready(previous)  # host copies of one tensor are in flight at most
            previous = placed[i]
        jax.block_until_ready(previous)
    return placed


def _load_converted(
    folder: Path, config: ModelConfig, params: nnx.State, devices: Devices
) -> list[list[list[jax.Array]]]:
    """The same, from a converted checkpoint."""
    mesh = jax.sharding.Mesh(np.array(devices[0]), (TP_AXIS,))
    wanted = {
        tensor_name(path): jax.ShapeDtypeStruct(
            param.shape, param.dtype, sharding=jax.sharding.NamedSharding(mesh, partition_spec(path))
        )
        for path, param in zip(param_paths(params), jax.tree.leaves(params), strict=True)
    }
    arrays = orbax_checkpoint.read(folder, config, wanted)
    return [_replicate(_shards_of(arrays[name], devices), devices) for name in wanted]


def _shards_of(array: jax.Array, devices: Devices) -> list[jax.Array]:
    """The local arrays of one that is spread over the first instance, by rank."""
    by_device = {shard.device: shard.data for shard in array.addressable_shards}
    return [by_device[device] for device in devices[0]]


def _place(files: dict[str, SafetensorsFile], name: str) -> tuple[str, int]:
    """Where a tensor lies, so that files are read from front to back."""
    return str(files[name].path), files[name].tensors[name].begin


def _host_shards(file: SafetensorsFile, path: ParamPath, shape: tuple[int, ...], tp: int) -> Iterator[np.ndarray]:
    """One parameter's shard for each tensor-parallel rank, in the file's dtype.

    Where `shape`, the logical one, has more rows than the file (a padded vocabulary), they are zeros.
    """
    name = tensor_name(path)
    match split_dim(path):
        case None:
            whole = file.read_rows(name)
            yield from (whole for _ in range(tp))
        case 1:
            yield from file.read_columns(name, tp)
        case _:
            num_rows = file.tensors[name].shape[0]
            size = shape[0] // tp
            for rank in range(tp):
                end = min((rank + 1) * size, num_rows)
                rows = file.read_rows(name, min(rank * size, end), end)
                num_padding = size - rows.shape[0]
                yield np.pad(rows, ((0, num_padding), *((0, 0),) * (rows.ndim - 1))) if num_padding else rows


def _replicate(by_rank: list[jax.Array], devices: Devices) -> list[list[jax.Array]]:
    """One parameter's shards by instance and rank, from those of the first instance, device to device."""
    return [by_rank] + [
        [jax.device_put(shard, device) for shard, device in zip(by_rank, instance_devices, strict=True)]
        for instance_devices in devices[1:]
    ]


def _random_param(
    path: ParamPath, param: jax.ShapeDtypeStruct, key: jax.Array, sharding: jax.sharding.NamedSharding
) -> jax.Array:
    if len(param.shape) == 1:
        value = jnp.ones if path[-1] == "weight" else jnp.zeros
        return value(param.shape, param.dtype, device=sharding)
    return _normal_program(param.shape, param.dtype, sharding)(key)


@functools.cache
def _normal_program(
    shape: tuple[int, ...], dtype: jnp.dtype, sharding: jax.sharding.NamedSharding
) -> Callable[[jax.Array], jax.Array]:
    """Draws a matrix [out, in] with variance 1 / in, compiled once for every shape and device set."""
    init = jax.nn.initializers.normal(stddev=shape[1] ** -0.5)
    return jax.jit(lambda key: init(key, shape, dtype), out_shardings=sharding)


def _states(treedef: Any, placed: list[list[list[jax.Array]]], devices: Devices) -> InstanceWeights:
    """From [parameter][instance][rank] to states by instance and rank."""
    return [
        [
            jax.tree.unflatten(treedef, [by_instance[instance][rank] for by_instance in placed])
            for rank in range(len(devices[instance]))
        ]
        for instance in range(len(devices))
    ]


def _tp_of(devices: Devices) -> int:
    tp = len(devices[0])
    assert all(len(instance_devices) == tp for instance_devices in devices), devices
    return tp
