"""An estimate of iteration times from the device's rates and the model's shape, where nothing was measured."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from loongjax.costmodel.migration_time import MigrationTime
from loongjax.costmodel.model import CostModel, Source
from loongjax.costmodel.model_shape import ModelShape
from loongjax.costmodel.work import DecodeTotals, PrefillTotals, Strategy, ceil, larger
from loongjax.errors import ConfigError

PARTIAL_RESULT_BYTES = 4
"""Bytes of an element of a partial attention result, float32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceRates:
    """What one device does at best, as measured where possible rather than by its datasheet.

    Raises:
        ConfigError: a rate that is not above 0, or a negative time.
    """

    name: str
    flops_per_s: float
    """Of matrix products in the model's type."""
    memory_bytes_per_s: float
    link_bytes_per_s: float
    """To one other device, one way."""
    layer_overhead_s: float
    """What a layer takes beyond its work, for launching kernels."""
    collective_s: float
    """What one small collective, or one step of a ring, takes."""

    def __post_init__(self) -> None:
        rates = (self.flops_per_s, self.memory_bytes_per_s, self.link_bytes_per_s)
        if min(rates) <= 0.0 or min(self.layer_overhead_s, self.collective_s) < 0.0:
            raise ConfigError(f"a device's rates are above 0 and its overheads not negative, got {self}")

    @classmethod
    def of_device(cls, device_kind: str) -> DeviceRates:
        """The rates of a device that names itself so; a slow generic device's (`name` says it) if it is not known."""
        known = known_name(device_kind)
        if known is None:
            return cls(name=f"generic ({device_kind} is not known)", **_GENERIC)
        return cls(name=device_kind, **_KNOWN[known])


def known_name(device_kind: str) -> str | None:
    """The one of `known_names` that a device which names itself so is; None if it is none of them."""
    return next((name for name in _KNOWN if name in device_kind.upper()), None)


def known_names() -> tuple[str, ...]:
    """The devices whose rates are known."""
    return tuple(_KNOWN)


_GENERIC = {
    "flops_per_s": 1e11,
    "memory_bytes_per_s": 2e10,
    "link_bytes_per_s": 1e10,
    "layer_overhead_s": 1e-4,
    "collective_s": 1e-4,
}
_KNOWN = {
    # Measured: a large bf16 product, a copy by CUDA's events, a large permute, a decode step's time beyond its weights.
    "H200": {
        "flops_per_s": 643e12,
        "memory_bytes_per_s": 4.3e12,
        "link_bytes_per_s": 150e9,
        "layer_overhead_s": 20e-6,
        "collective_s": 25e-6,
    },
    # As the H200 but for its memory, by datasheets.
    "H100": {
        "flops_per_s": 643e12,
        "memory_bytes_per_s": 3.0e12,
        "link_bytes_per_s": 150e9,
        "layer_overhead_s": 20e-6,
        "collective_s": 25e-6,
    },
    # Four fifths of the datasheets' rates.
    "A100": {
        "flops_per_s": 250e12,
        "memory_bytes_per_s": 1.6e12,
        "link_bytes_per_s": 120e9,
        "layer_overhead_s": 20e-6,
        "collective_s": 25e-6,
    },
    "A800": {
        "flops_per_s": 250e12,
        "memory_bytes_per_s": 1.6e12,
        "link_bytes_per_s": 80e9,
        "layer_overhead_s": 20e-6,
        "collective_s": 25e-6,
    },
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _PrefillRates:
    """What prefills of a strategy depend on but for their sizes."""

    flops_per_s: float
    weights_s: float
    """Reading the weights."""
    ring_token_s: float
    """Passing a token around the ring."""
    pair_s: float
    """Computing with a pair of a new and a past token."""
    key_s: float
    """Reading a past token's key."""
    overheads_s: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class _RatesOfDops:
    """What prefills on 1, 2, ... instances depend on but for their sizes: float64 [dops, 1]."""

    sp: np.ndarray
    flops_per_s: np.ndarray
    weights_s: np.ndarray
    """Reading the weights."""
    slow_rings: list[tuple[int, float]]
    """Rows and seconds a token of rings that are not faster than the products of any token: the others never are the
    longest."""
    pair_s: np.ndarray
    """Computing with a pair of a new and a past token."""
    key_s: np.ndarray
    """Reading a past token's key."""
    overheads_s: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class _DecodeRates:
    """What decode steps of a strategy depend on but for their sizes."""

    flops_per_s: float
    """Of a master."""
    weights_s: float
    """Reading the weights."""
    key_s: float
    """Reading a key."""
    overheads_s: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class RooflineModel(CostModel):
    """A `CostModel` by arithmetic: work takes the longer of computing and moving bytes, evenly over the devices."""

    rates: DeviceRates
    model: ModelShape

    @property
    def source(self) -> Source:
        return "roofline"

    def prefill_s[Real: (float, np.ndarray)](self, strategy: Strategy, totals: PrefillTotals[Real]) -> Real:
        """The longest of computing, reading the weights, and passing the keys around the ring; then attention to past
        tokens, over the instances: reading their keys, and computing; and the overheads.
        """
        sp, tp = strategy.sp, strategy.tp
        rates = self._prefill_rates(sp, tp)
        seconds = larger(self.model.prefill_flops(totals) / rates.flops_per_s, rates.weights_s)
        # A scheduler asks about thousands of batches at a time, so what is 0 for all of them is left out.
        if sp > 1:
            seconds = larger(seconds, rates.ring_token_s * totals.num_tokens)
        if tp > 1:
            seconds = seconds + self._all_reduces_s(tp, ceil(totals.num_tokens / sp))
        past = totals.new_times_past * rates.pair_s + totals.past_keys * rates.key_s
        return seconds + (past + rates.overheads_s)

    def prefills_s(self, tp: int, totals: PrefillTotals[np.ndarray], out: Float[np.ndarray, "dops batches"]) -> None:
        """As `prefill_s`, on all numbers of instances at a time."""
        rates = self._rates_of_dops(len(out), tp)
        np.divide(self.model.prefill_flops(totals), rates.flops_per_s, out=out)
        np.maximum(out, rates.weights_s, out=out)
        for row, ring_token_s in rates.slow_rings:
            np.maximum(out[row], ring_token_s * totals.num_tokens, out=out[row])
        if tp > 1:
            out += self._all_reduces_s(tp, np.ceil(totals.num_tokens / rates.sp))
        past = totals.new_times_past * rates.pair_s + totals.past_keys * rates.key_s
        out += past + rates.overheads_s

    def decode_s[Real: (float, np.ndarray)](self, strategy: Strategy, totals: DecodeTotals[Real]) -> Real:
        """The weights read once or the rows computed, whichever is longer; the fullest instance's keys read; the
        group's queries and partial results exchanged; and the overheads.
        """
        sp, tp = strategy.sp, strategy.tp
        rates = self._decode_rates(sp, tp)
        compute = self.model.decode_row_flops * totals.busiest_rows / rates.flops_per_s
        own = larger(compute, rates.weights_s) + totals.busiest_keys * rates.key_s
        if tp > 1:
            own = own + self._all_reduces_s(tp, totals.busiest_rows)
        if sp == 1:
            return own + rates.overheads_s
        row_bytes = self.model.num_q_heads * self.model.head_dim * (self.model.dtype_bytes + PARTIAL_RESULT_BYTES) / tp
        exchange = totals.num_rows * self.model.num_layers * row_bytes / self.rates.link_bytes_per_s
        return own + exchange + rates.overheads_s

    def migration_s(self, num_tokens: int | float, tp: int) -> float:
        """Its bytes at the link's rate, after one collective's latency."""
        return self._migration.seconds(num_tokens, self.model, tp)

    @functools.cached_property
    def _prefill_rates(self) -> Callable[[int, int], _PrefillRates]:
        """Of (sp, tp), found once."""
        return functools.cache(self._find_prefill_rates)

    def _find_prefill_rates(self, sp: int, tp: int) -> _PrefillRates:
        return _PrefillRates(
            flops_per_s=sp * tp * self.rates.flops_per_s,
            weights_s=self._weights_s(tp),
            ring_token_s=self._ring_token_s(sp, tp),
            pair_s=self.model.pair_flops / (sp * tp * self.rates.flops_per_s),
            key_s=self._key_s(tp) / sp,
            overheads_s=self._overheads_s(tp, sp - 1),
        )

    @functools.cached_property
    def _decode_rates(self) -> Callable[[int, int], _DecodeRates]:
        """Of (sp, tp), found once."""
        return functools.cache(self._find_decode_rates)

    def _find_decode_rates(self, sp: int, tp: int) -> _DecodeRates:
        return _DecodeRates(
            flops_per_s=tp * self.rates.flops_per_s,
            weights_s=self._weights_s(tp),
            key_s=self._key_s(tp),
            overheads_s=self._overheads_s(tp, 2 if sp > 1 else 0),
        )

    @functools.cached_property
    def _rates_of_dops(self) -> Callable[[int, int], _RatesOfDops]:
        """Of (how many DoPs, tp), found once."""
        return functools.cache(self._find_rates_of_dops)

    def _find_rates_of_dops(self, num_dops: int, tp: int) -> _RatesOfDops:
        sp = np.arange(1.0, num_dops + 1.0)[:, None]
        flops_per_s = sp * tp * self.rates.flops_per_s
        ring_token_s = self._ring_token_s(sp, tp)
        is_slow = ring_token_s > 0.99 * 2.0 * self.model.num_layer_params / flops_per_s
        return _RatesOfDops(
            sp=sp,
            flops_per_s=flops_per_s,
            weights_s=np.full_like(sp, self._weights_s(tp)),
            slow_rings=[(row, float(ring_token_s[row, 0])) for row in np.flatnonzero(is_slow).tolist()],
            pair_s=self.model.pair_flops / flops_per_s,
            key_s=self._key_s(tp) / sp,
            overheads_s=self._overheads_s(tp, sp - 1.0),
        )

    @functools.cached_property
    def _migration(self) -> MigrationTime:
        return MigrationTime(latency_s=self.rates.collective_s, per_byte_s=1.0 / self.rates.link_bytes_per_s)

    def _weights_s(self, tp: int) -> float:
        return self.model.weight_bytes / tp / self.rates.memory_bytes_per_s

    def _ring_token_s[Real: (float, np.ndarray)](self, sp: Real, tp: int) -> Real:
        """Passing a token's keys and values by the other instances of a ring."""
        return (sp - 1) / sp * self.model.device_kv_bytes_per_token(tp) / self.rates.link_bytes_per_s

    def _key_s(self, tp: int) -> float:
        """Reading a token's keys and values, in all layers."""
        return self.model.device_kv_bytes_per_token(tp) / self.rates.memory_bytes_per_s

    def _all_reduces_s[Real: (float, np.ndarray)](self, tp: int, rows: Real) -> Real:
        """Two sums over an instance's devices a layer: each device sends 2 (tp - 1) / tp of the activations."""
        activation_bytes = rows * self.model.hidden_size * self.model.dtype_bytes
        return 2 * self.model.num_layers * 2 * (tp - 1) / tp * activation_bytes / self.rates.link_bytes_per_s

    def _overheads_s[Real: (float, np.ndarray)](self, tp: int, sp_collectives: Real) -> Real:
        collectives = sp_collectives + (2 if tp > 1 else 0)
        return self.model.num_layers * (self.rates.layer_overhead_s + collectives * self.rates.collective_s)
