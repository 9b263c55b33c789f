"""A Llama run the plain way: one program, every key recomputed, dense causal attention."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from loongjax.models.checkpoint import load_weights
from loongjax.models.config import ModelConfig
from loongjax.models.llama import Llama
from loongjax.models.sharding import abstract_params, partition_specs


def causal_attention(layer, q, k, v, carry):
    """softmax(q k^T / sqrt(H)) v over keys at or before each query, in float32."""
    num_tokens, num_q_heads, head_dim = q.shape
    k, v = (jnp.repeat(x, num_q_heads // x.shape[1], axis=1).astype(jnp.float32) for x in (k, v))
    scores = jnp.einsum("TNH,SNH->NTS", q.astype(jnp.float32), k, precision="highest") / jnp.float32(head_dim**0.5)
    mask = jnp.tril(jnp.ones((num_tokens, num_tokens), bool))
    weights = jax.nn.softmax(jnp.where(mask[None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("NTS,SNH->TNH", weights, v, precision="highest").astype(q.dtype), carry


class DenseLlama:
    """Log-probabilities of whole sequences, over the first `tp` devices; sequences are padded to one length."""

    def __init__(self, checkpoint: Path, *, tp: int = 1, dtype: str = "float32", max_len: int = 384) -> None:
        self.config = ModelConfig.from_checkpoint(checkpoint)
        self.max_len = max_len
        devices = jax.devices()[:tp]
        tp_axis = "tp" if tp > 1 else None
        model = nnx.eval_shape(lambda: Llama(self.config, dtype=dtype, tp=tp, tp_axis=tp_axis, rngs=nnx.Rngs(0)))
        graphdef = nnx.graphdef(model)
        [shards] = load_weights(checkpoint, self.config, dtype=dtype, devices=[devices])

        def logits(state, token_ids, positions):
            llama = nnx.merge(graphdef, state)
            hidden, _ = llama.hidden(token_ids, positions, causal_attention, None)
            return llama.logits(hidden)

        if tp == 1:
            self._logits, self._state = jax.jit(logits), shards[0]
            return
        mesh = Mesh(np.array(devices), ("tp",))
        specs = partition_specs(abstract_params(self.config, dtype=dtype, tp=tp))
        whole = PartitionSpec()
        self._logits = jax.jit(
            jax.shard_map(logits, mesh=mesh, in_specs=(specs, whole, whole), out_specs=PartitionSpec(None, "tp"))
        )
        self._state = jax.tree.map(functools.partial(_gather, mesh), specs, *shards)

    def logits(self, token_ids) -> np.ndarray:
        """float32 [T, padded vocabulary]."""
        padded = np.zeros(self.max_len, np.int32)
        padded[: len(token_ids)] = token_ids
        positions = np.arange(self.max_len, dtype=np.int32)
        return np.asarray(self._logits(self._state, jnp.asarray(padded), jnp.asarray(positions)))[: len(token_ids)]

    def logprobs(self, token_ids) -> np.ndarray:
        """float64 [T, vocabulary]: row i is of the token after i."""
        logits = self.logits(token_ids)[:, : self.config.vocab_size].astype(np.float64)
        shifted = logits - logits.max(axis=-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def _gather(mesh: Mesh, spec: PartitionSpec, *shards: jax.Array) -> jax.Array:
    shape = [size * (len(shards) if dim < len(spec) and spec[dim] else 1) for dim, size in enumerate(shards[0].shape)]
    sharding = jax.sharding.NamedSharding(mesh, spec)
    return jax.make_array_from_single_device_arrays(tuple(shape), sharding, list(shards))
