"""Weights from a Hugging Face checkpoint, or random ones, straight to the devices that need them."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from loongjax.errors import CheckpointError
from loongjax.models.config import ModelConfig, read_json_object
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

logger = logging.getLogger(__name__)

Devices = Sequence[Sequence[jax.Device]]  # pyright: ignore[reportInvalidTypeForm] (jax hides that it is a class)
"""By instance, then by tensor-parallel rank; every instance has as many."""

InstanceWeights = list[list[nnx.State]]
"""Local shards by instance and tensor-parallel rank, in the structure of `nnx.state(model, nnx.Param)`, each array
whole on one device."""

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


def load_weights(checkpoint_dir: Path | str, config: ModelConfig, *, dtype: Any, devices: Devices) -> InstanceWeights:
    """Reads a checkpoint tensor by tensor, and of each only the slices that a device needs.

    Host memory grows by at most two tensors; on the CPU backend the weights themselves live there too. Instances after
    the first get their replicas from its devices.

    Args:
        checkpoint_dir: a folder with model.safetensors, or an index and its files.
        config: of that checkpoint.
        dtype: that the weights will have.
        devices: where they go.

    Raises:
        CheckpointError: naming the file or tensor that is missing, left over, misshapen or cut short.
        ConfigError: the model cannot be cut over that many devices.
    """
    tp = _tp_of(devices)
    params = abstract_params(config, dtype=dtype, tp=tp)
    paths = param_paths(params)
    with contextlib.ExitStack() as stack:
        sources: dict[str, SafetensorsFile] = {}
        for path in weight_files(Path(checkpoint_dir)):
            file = stack.enter_context(SafetensorsFile(path))
            sources |= dict.fromkeys(file.tensors, file)
        _check_tensors(Path(checkpoint_dir), config, sources)
        order = sorted(range(len(paths)), key=lambda i: _place(sources, tensor_name(paths[i])))
        placed: list[list[list[jax.Array]]] = [[] for _ in paths]
        previous: list[list[jax.Array]] = []
        for i in tqdm(order, desc="Loading weights", unit="tensor", disable=None):
            # The devices cast: it is faster there, and rounds the same.
            shards = _host_shards(sources[tensor_name(paths[i])], paths[i], tp, config.padded_vocab_size(tp))
            by_rank = [
                jax.device_put(shard, device).astype(dtype) for shard, device in zip(shards, devices[0], strict=True)
            ]
            placed[i] = _replicate(by_rank, devices)
            jax.block_until_ready(previous)  # host copies of one tensor are in flight at most
            previous = placed[i]
        jax.block_until_ready(previous)
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
        by_device = {shard.device: shard.data for shard in array.addressable_shards}
        placed.append(_replicate([by_device[device] for device in devices[0]], devices))
    return _states(jax.tree.structure(params), placed, devices)


def weight_files(checkpoint_dir: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those that its index names, or else all there are.

    Raises:
        CheckpointError: no such folder, no such files, or a file missing of those that the index names.
    """
    if not checkpoint_dir.is_dir():
        raise CheckpointError(f"{checkpoint_dir} is not a folder; give the path of a Hugging Face checkpoint's folder")
    index = checkpoint_dir / INDEX_FILE
    if index.exists():
        weight_map = read_json_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(f"{index} must map tensor names to file names under 'weight_map'")
        files = [checkpoint_dir / name for name in sorted(set(weight_map.values()))]
        for path in files:
            if not path.is_file():
                raise CheckpointError(f"{path} is missing; {index.name} names it")
        return files
    single = checkpoint_dir / SINGLE_FILE
    files = [single] if single.exists() else sorted(checkpoint_dir.glob("*.safetensors"))
    if files:
        return files
    if pickles := sorted(path.name for path in checkpoint_dir.glob("*.bin")):
        raise CheckpointError(
            f"{checkpoint_dir} holds only pickled weights ({', '.join(pickles)}), which are not read; convert them "
            "with transformers: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    raise CheckpointError(f"{checkpoint_dir} holds no weights (*.safetensors)")


def _check_tensors(checkpoint_dir: Path, config: ModelConfig, sources: dict[str, SafetensorsFile]) -> None:
    """Raises CheckpointError unless the files hold what the model needs, and nothing that it would not use."""
    expected = abstract_params(config, dtype=config.dtype)
    shapes = {
        tensor_name(path): param.shape
        for path, param in zip(param_paths(expected), jax.tree.leaves(expected), strict=True)
    }
    if missing := sorted(shapes.keys() - sources.keys()):
        raise CheckpointError(f"{checkpoint_dir} lacks {_some(missing)}")
    harmless = {name for name in sources if name.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings:
        harmless.add("lm_head.weight")
    if unexpected := sorted(sources.keys() - shapes.keys() - harmless):
        raise CheckpointError(f"{checkpoint_dir} holds what its config.json has no place for: {_some(unexpected)}")
    for name, shape in shapes.items():
        found = sources[name].tensors[name].shape
        if found != shape:
            raise CheckpointError(
                f"{sources[name].path}: tensor {name} has shape {list(found)}; "
                f"by config.json it must have {list(shape)}"
            )
        sources[name].dtype(name)


def _some(names: list[str], most: int = 5) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return f"tensor{'s' if len(names) > 1 else ''} {', '.join(names[:most])}{rest}"


def _place(sources: dict[str, SafetensorsFile], name: str) -> tuple[str, int]:
    """Where a tensor lies, so that files are read from front to back."""
    return str(sources[name].path), sources[name].tensors[name].begin


def _host_shards(file: SafetensorsFile, path: ParamPath, tp: int, padded_vocab_size: int) -> Iterator[np.ndarray]:
    """One parameter's shard for each tensor-parallel rank, in the file's dtype."""
    name = tensor_name(path)
    match split_dim(path):
        case None:
            whole = file.read_rows(name)
            yield from (whole for _ in range(tp))
        case 1:
            yield from file.read_columns(name, tp)
        case _:
            num_rows = file.tensors[name].shape[0]
            has_vocabulary = path[-2] in ("embed_tokens", "lm_head")
            size = (padded_vocab_size if has_vocabulary else num_rows) // tp
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
