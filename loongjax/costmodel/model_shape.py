"""What a model costs by its shape: FLOPs, and bytes of weights and of keys and values."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from loongjax.costmodel.work import PrefillTotals
from loongjax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a Llama-shaped model.

    Raises:
        ConfigError: a size below 1.
    """

    hidden_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    dtype_bytes: int = 2
    """Bytes of a weight, and of an element of the KV pool."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value < 1:
                raise ConfigError(f"{field.name} of a model's shape must be at least 1, got {value}")

    @functools.cached_property
    def num_layer_params(self) -> int:
        """Weights in the matrices of all layers: query, key, value and output projections, and a gated FFN."""
        attention = 2 * self.hidden_size * (self.num_q_heads + self.num_kv_heads) * self.head_dim
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    @functools.cached_property
    def weight_bytes(self) -> int:
        """Bytes of weights that every iteration reads: the layers and the output projection, no embedding table."""
        return (self.num_layer_params + self.vocab_size * self.hidden_size) * self.dtype_bytes

    @functools.cached_property
    def kv_bytes_per_token(self) -> int:
        """Bytes of one token's keys and values, over all layers and heads."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype_bytes

    def device_kv_bytes_per_token(self, tp: int) -> int:
        """Bytes of one token's keys and values on one of an instance's devices, which hold whole heads."""
        return self.kv_bytes_per_token // self.num_kv_heads * -(-self.num_kv_heads // tp)

    def prefill_flops[Real: (float, np.ndarray)](self, totals: PrefillTotals[Real]) -> Real:
        """FLOPs of prefills, their pairs with past tokens left out: two a weight and token, and those of the pairs.

        The output projection of one row a request is left out: it is less than a thousandth of a usual prompt.
        """
        attention = 0.5 * self.pair_flops * totals.squared_lens
        return 2.0 * self.num_layer_params * totals.num_tokens + attention

    @functools.cached_property
    def pair_flops(self) -> float:
        """FLOPs of one query with one key, over all layers: four a head dimension and head."""
        return 4.0 * self.num_layers * self.num_q_heads * self.head_dim

    @functools.cached_property
    def decode_row_flops(self) -> float:
        """FLOPs of one decoded token but for attention, which is bound by memory."""
        return 2.0 * (self.num_layer_params + self.vocab_size * self.hidden_size)
