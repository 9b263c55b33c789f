"""How a Llama's parameters are cut over the mesh axis "tp", and what they are called in Hugging Face checkpoints."""

from __future__ import annotations

from typing import Any, cast

import jax
from flax import nnx
from jax.sharding import PartitionSpec

from loongjax.models.config import ModelConfig
from loongjax.models.llama import Llama

TP_AXIS = "tp"

ParamPath = tuple[str | int, ...]
"""Where a parameter sits in the model, such as ("layers", 0, "mlp", "up_proj", "weight")."""

_ROWS = frozenset({"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head"})
"""Modules whose outputs, or vocabulary, are split: the first dim of weight and bias."""
_COLUMNS = frozenset({"o_proj", "down_proj"})
"""Modules whose inputs are split: the second dim of the weight. The bias is added after the sum, so it is whole."""


def abstract_params(config: ModelConfig, *, dtype: Any, tp: int = 1) -> nnx.State:
    """The model's parameters as shapes and dtypes: logical, unsharded, the vocabulary padded to `tp`.

    Raises:
        ConfigError: the model cannot be cut `tp` ways.
    """
    model = nnx.eval_shape(lambda: Llama(config, dtype=dtype, tp=tp, rngs=nnx.Rngs(0)))
    return nnx.state(model, nnx.Param)


def param_paths(params: nnx.State) -> list[ParamPath]:
    """The path of every parameter, in the order of `jax.tree.leaves(params)`."""
    return [cast(ParamPath, path) for path, _ in nnx.to_flat_state(params)]


def partition_spec(path: ParamPath) -> PartitionSpec:
    """How one parameter is cut."""
    module, name = path[-2], path[-1]
    if module in _ROWS:
        return PartitionSpec(TP_AXIS, None) if name == "weight" else PartitionSpec(TP_AXIS)
    if module in _COLUMNS and name == "weight":
        return PartitionSpec(None, TP_AXIS)
    return PartitionSpec()


def split_dim(path: ParamPath) -> int | None:
    """The dim of a parameter that is cut over "tp"; None if every device has all of it."""
    spec = partition_spec(path)
    return spec.index(TP_AXIS) if TP_AXIS in spec else None


def partition_specs(params: nnx.State) -> nnx.State:
    """A PartitionSpec for every parameter, in the same structure: in_specs for `shard_map`."""
    treedef = jax.tree.structure(params)
    return jax.tree.unflatten(treedef, [partition_spec(path) for path in param_paths(params)])


def tensor_name(path: ParamPath) -> str:
    """The parameter's name in a Hugging Face checkpoint, such as "model.layers.0.mlp.up_proj.weight"."""
    name = ".".join(str(part) for part in path)
    return name if path[0] == "lm_head" else f"model.{name}"
