"""Whole-prompt attention of others, as the issue's rivals of prefill attention: with log-sum-exp, on dense batches."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@runtime_checkable
class Rival(Protocol):
    """Attends, and gives output [B, T, N, H] and natural log-sum-exp [B, T, N]."""

    def __call__(self, q: Any, k: Any, v: Any, *, is_causal: bool) -> tuple[jax.Array, jax.Array]: ...


def cudnn_attention(
    q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], *, is_causal: bool
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """cuDNN's kernel writes the log-sum-exp in float32; jax rounds it after."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=is_causal, implementation="cudnn", return_residual=True)


def tokamax_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    is_causal: bool,
    num_stages: int = 2,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """tokamax's Mosaic GPU kernel, tuned as its own autotuning tunes 128-dim heads on an H100: three stages for causal
    32/8 heads, two for others, never persistent.

    Raises:
        ImportError: tokamax is not installed.
    """
    from tokamax.ops.gpu import PallasMosaicFlashAttention  # pyright: ignore[reportMissingImports]

    settings = {"is_causal": is_causal, "return_residuals": True}
    heuristic = PallasMosaicFlashAttention().bind(q, k, v, **settings).heuristics_config
    config = dataclasses.replace(heuristic, persistent=False, num_stages=num_stages)
    o, (maximum, total) = PallasMosaicFlashAttention(config=config)(q, k, v, **settings)
    return o, (maximum + jnp.log(total)).swapaxes(1, 2)


RIVALS: dict[str, Rival] = {
    "cudnn": cudnn_attention,
    "tokamax": tokamax_attention,
    "tokamax_three_stages": functools.partial(tokamax_attention, num_stages=3),
}


def installed_rivals() -> dict[str, Rival]:
    """Those that can run on a GPU with the packages of this environment; says on standard output what is missing."""
    try:
        import tokamax.ops.gpu  # pyright: ignore[reportMissingImports] # noqa: F401
    except Exception as error:  # what it imports may fail in other ways than being absent
        print(f"without tokamax: {error!r}", flush=True)
        return {"cudnn": RIVALS["cudnn"]}
    return RIVALS
