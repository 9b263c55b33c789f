"""The time of moving keys and values from one instance to another."""

from __future__ import annotations

import dataclasses

from loongjax.costmodel.coefficients import check_coefficients
from loongjax.costmodel.model_shape import ModelShape


@dataclasses.dataclass(frozen=True, kw_only=True)
class MigrationTime:
    """latency + bytes x (1 / bandwidth); each of an instance's devices sends its own heads to its counterpart at the
    same time.

    The paper's equation 4 has V(e_min) / avg_bandwidth: here the volume follows from the model and the bandwidth is
    measured.
    """

    latency_s: float
    per_byte_s: float
    """The inverse of the bandwidth between a pair of devices, in seconds a byte."""

    def __post_init__(self) -> None:
        check_coefficients(self)

    @staticmethod
    def device_bytes(num_tokens: int | float, model: ModelShape, tp: int) -> float:
        """Bytes that one device sends."""
        return float(num_tokens) * model.device_kv_bytes_per_token(tp)

    def seconds(self, num_tokens: int | float, model: ModelShape, tp: int) -> float:
        """Of moving so many tokens' keys and values."""
        return self.latency_s + self.per_byte_s * self.device_bytes(num_tokens, model, tp)
