"""Rotary position embedding: the frequencies of each kind, and the rotation.

The host computes frequencies in float32, operation by operation as the reference implementation of each kind does, so
that an angle at position 500,000 is the one the model was trained with.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from loongjax.errors import ConfigError

_LARGEST = 1e12
"""Above any sensible constant, and squared still a float32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Plain rotary embedding (Su et al. 2021, equation 15). Construction raises ConfigError for what cannot work."""

    theta: float = 10000.0
    """The base: frequency i is theta ** (-2 i / head_dim)."""

    def __post_init__(self) -> None:
        _require(1.0 < self.theta < _LARGEST, "rope_theta must be above 1", self.theta)

    def inverse_frequencies(self, head_dim: int) -> np.ndarray:
        """float32 [head_dim / 2], in radians a token, fastest first."""
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        return np.float32(1.0) / np.float32(self.theta) ** exponents

    @property
    def attention_factor(self) -> float:
        """What the rotated queries and keys are both multiplied by."""
        return 1.0

    def context_len(self, max_position_embeddings: int) -> int:
        """Tokens that a model with this `max_position_embeddings` is meant to reach."""
        return max_position_embeddings


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearRope(Rope):
    """Position interpolation (Chen et al. 2023): all frequencies divided by one factor."""

    factor: float

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_factor(self.factor)

    def inverse_frequencies(self, head_dim: int) -> np.ndarray:
        return super().inverse_frequencies(head_dim) / np.float32(self.factor)

    def context_len(self, max_position_embeddings: int) -> int:
        return int(max_position_embeddings * self.factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Rope(Rope):
    """Llama 3.1: low frequencies divided by a factor, high ones left, those between interpolated."""

    factor: float
    low_freq_factor: float
    """Wavelengths above original context / this are divided by `factor`."""
    high_freq_factor: float
    """Wavelengths below original context / this are left."""
    original_max_position_embeddings: int
    """Context of the pre-training, in tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_factor(self.factor)
        _require_context(self.original_max_position_embeddings)
        _require(
            0.0 < self.low_freq_factor < self.high_freq_factor < _LARGEST,
            "low_freq_factor must be above 0 and below high_freq_factor",
            (self.low_freq_factor, self.high_freq_factor),
        )

    def inverse_frequencies(self, head_dim: int) -> np.ndarray:
        plain = super().inverse_frequencies(head_dim)
        wavelengths = np.float32(2 * math.pi) / plain
        context_len = np.float32(self.original_max_position_embeddings)
        low, high = np.float32(self.low_freq_factor), np.float32(self.high_freq_factor)
        divided = plain / np.float32(self.factor)
        smooth = (context_len / wavelengths - low) / (high - low)
        between = (np.float32(1) - smooth) * divided + smooth * plain
        return np.where(
            wavelengths > context_len / low, divided, np.where(wavelengths < context_len / high, plain, between)
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnRope(Rope):
    """YaRN (Peng et al. 2023, section 3): interpolation by parts, and a temperature on the attention logits."""

    factor: float
    original_max_position_embeddings: int
    """Context of the pre-training, in tokens."""
    explicit_attention_factor: float | None = None
    """Overrides the one that follows from `factor`."""
    mscale: float | None = None
    mscale_all_dim: float | None = None
    """With `mscale`: the attention factor is the ratio of the two scales (DeepSeek's variant)."""
    beta_fast: float = 32.0
    """Frequencies with more rotations than this within the original context are left."""
    beta_slow: float = 1.0
    """Frequencies with fewer rotations than this are divided by `factor`."""
    truncate: bool = True
    """Whether the ramp begins and ends on whole frequency indices."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_factor(self.factor)
        _require_context(self.original_max_position_embeddings)
        _require(
            0.0 < self.beta_slow < self.beta_fast < _LARGEST,
            "beta_slow must be above 0 and below beta_fast",
            (self.beta_slow, self.beta_fast),
        )
        mscales = (self.mscale or 1.0, self.mscale_all_dim or 1.0)
        _require(all(0.0 < mscale < _LARGEST for mscale in mscales), "mscales must be above 0", mscales)
        _require(0.0 < self.attention_factor < _LARGEST, "attention_factor must be above 0", self.attention_factor)

    def inverse_frequencies(self, head_dim: int) -> np.ndarray:
        plain = super().inverse_frequencies(head_dim)
        low, high = self._ramp(head_dim)
        ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
        return plain / np.float32(self.factor) * ramp + plain * (np.float32(1) - ramp)

    @property
    def attention_factor(self) -> float:
        if self.explicit_attention_factor is not None:
            return self.explicit_attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._scale(self.mscale) / self._scale(self.mscale_all_dim)
        return self._scale(1.0)

    def context_len(self, max_position_embeddings: int) -> int:
        return int(self.original_max_position_embeddings * self.factor)

    def _scale(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1.0 else 1.0

    def _ramp(self, head_dim: int) -> tuple[float, float]:
        """Frequency indices between which interpolation sets in."""

        def index_of(num_rotations: float) -> float:
            wavelength = self.original_max_position_embeddings / (num_rotations * 2 * math.pi)
            return head_dim * math.log(wavelength) / (2 * math.log(self.theta))

        low, high = index_of(self.beta_fast), index_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(float(low), 0.0), min(float(high), head_dim - 1.0)
        return low, high if high != low else high + 0.001


def _require(holds: bool, rule: str, found: object) -> None:
    if not holds:
        raise ConfigError(f"{rule}, got {found}")


def _require_factor(factor: float) -> None:
    _require(1.0 <= factor < _LARGEST, "rope factor must be at least 1", factor)


def _require_context(num_tokens: int) -> None:
    _require(1 <= num_tokens < _LARGEST, "original_max_position_embeddings must be at least 1", num_tokens)


def rotation(
    rope: Rope, head_dim: int, positions_T: Int[Array, " T"]
) -> tuple[Float[Array, "T R"], Float[Array, "T R"]]:
    """Cosines and sines of every position, float32, R = head_dim / 2, attention factor included."""
    angles_TR = positions_T.astype(jnp.float32)[:, None] * jnp.asarray(rope.inverse_frequencies(head_dim))[None, :]
    factor = jnp.float32(rope.attention_factor)
    return jnp.cos(angles_TR) * factor, jnp.sin(angles_TR) * factor


def apply_rope(
    x_TNH: Float[Array, "T N H"], rotation_TR: tuple[Float[Array, "T R"], Float[Array, "T R"]]
) -> Float[Array, "T N H"]:
    """Rotates the pairs (i, i + head_dim / 2) of every head, in float32; returns the dtype of `x_TNH`."""
    cos, sin = (part_TR[:, None, :] for part_TR in rotation_TR)
    first, second = jnp.split(x_TNH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
    return rotated.astype(x_TNH.dtype)
