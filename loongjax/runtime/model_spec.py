"""The static side of a model: what a program must know to rebuild it from a flat tuple of weights."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from loongjax.models.config import ModelConfig
from loongjax.models.llama import Llama
from loongjax.models.sharding import partition_specs
from loongjax.parallel.mesh import TP_AXIS


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A model's shape, number format and tensor parallelism; hashable, so programs take it as a static argument.

    Weights pass through programs as a flat tuple: flattening an `nnx.State` of hundreds of arrays on every call would
    cost more than the dispatch itself.
    """

    config: ModelConfig
    dtype: str
    """Of weights, activations and KV pool."""
    tp: int = 1

    def restore(self, weights: tuple[jax.Array, ...]) -> Llama:
        """The model over these weights, inside a program."""
        skeleton = _skeleton(self)
        return nnx.merge(skeleton.graphdef, jax.tree.unflatten(skeleton.treedef, weights))

    @property
    def weight_specs(self) -> tuple[PartitionSpec, ...]:
        """How each array of the flat tuple is cut over "tp"."""
        return _skeleton(self).specs

    def kv_shard_shape(self, num_pages: int, page_size: int) -> tuple[int, int, int, int, int, int]:
        """Of one device's part of the KV pool: [L, 2, P, page_size, K / tp, H]."""
        config = self.config
        return (config.num_layers, 2, num_pages, page_size, config.num_kv_heads // self.tp, config.head_dim)

    @property
    def num_kv_bytes_per_token(self) -> int:
        """On all devices of one instance together."""
        config = self.config
        return config.num_layers * 2 * config.num_kv_heads * config.head_dim * jnp.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class _Skeleton:
    graphdef: Any
    treedef: Any
    specs: tuple[PartitionSpec, ...]


@functools.cache
def _skeleton(spec: ModelSpec) -> _Skeleton:
    def build() -> Llama:
        return Llama(spec.config, dtype=jnp.dtype(spec.dtype), tp=spec.tp, tp_axis=TP_AXIS, rngs=nnx.Rngs(0))

    graphdef, state = nnx.split(nnx.eval_shape(build))
    specs = jax.tree.leaves(partition_specs(state), is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))
    return _Skeleton(graphdef, jax.tree.structure(state), tuple(specs))
