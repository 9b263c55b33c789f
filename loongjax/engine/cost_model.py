"""The times of iterations that an engine's policy reckons with."""

from __future__ import annotations

import dataclasses
import logging
import pathlib

import jax.numpy as jnp

from loongjax.core.cluster import ClusterShape
from loongjax.costmodel.model import CostModel, FittedModel
from loongjax.costmodel.model_file import load
from loongjax.costmodel.model_shape import ModelShape
from loongjax.costmodel.roofline import DeviceRates, RooflineModel
from loongjax.costmodel.work import Strategy
from loongjax.errors import ConfigError
from loongjax.runtime.buckets import Buckets
from loongjax.runtime.model_spec import ModelSpec

logger = logging.getLogger(__name__)


def cost_shape(spec: ModelSpec) -> ModelShape:
    """What the cost model needs to know of a model."""
    config = spec.config
    return ModelShape(
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        num_q_heads=config.num_q_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        dtype_bytes=jnp.dtype(spec.dtype).itemsize,
    )


def resolve_cost_model(
    path: str | None, *, model: ModelShape, cluster: ClusterShape, buckets: Buckets, device_kind: str
) -> CostModel:
    """The cost model in a file, or a roofline estimate; the log says which.

    Args:
        path: the file, as `loongjax fit` writes it; None: estimate.
        model: the model that is served.
        cluster: the instances that may gather into groups.
        buckets: the sizes to which they pad.
        device_kind: what the devices call themselves.

    Raises:
        ConfigError: a file that cannot be read, that was fitted for another model, or lacks a group size that the
            cluster can form.
    """
    if path is None:
        rates = DeviceRates.of_device(device_kind)
        logger.info("cost model: a roofline estimate for %s; --cost-model FILE gives measured times", rates.name)
        return RooflineModel(rates=rates, model=model)
    fitted = load(pathlib.Path(path))
    _check_fit(path, fitted, model, cluster)
    provenance = fitted.provenance
    if device_kind.upper() not in provenance.hardware.upper():
        logger.warning(
            "cost model %s was fitted on %s, and this is %s: fit it here, unless the two are equally fast",
            path,
            provenance.hardware,
            device_kind,
        )
    if fitted.migration is None and cluster.num_instances > 1:
        logger.warning("cost model %s has no migration times: no keys will be moved; measure migrations, and fit", path)
    logger.info(
        "cost model: %s, fitted on %s at commit %s", path, provenance.hardware, provenance.commit or "(unknown)"
    )
    return fitted.padded_to(buckets.num_tokens, buckets.num_rows)


def _check_fit(path: str, fitted: FittedModel, model: ModelShape, cluster: ClusterShape) -> None:
    expected, found = dataclasses.asdict(model), dataclasses.asdict(fitted.provenance.model)
    differing = [
        f"{name} {found[name]} instead of {expected[name]}" for name in expected if found[name] != expected[name]
    ]
    if differing:
        raise ConfigError(
            f"the cost model {path} is for another model, with {', '.join(differing)}: profile and fit this one, or "
            "leave --cost-model out"
        )
    try:
        fitted.require(Strategy(sp, cluster.tp) for sp in range(1, cluster.num_instances + 1))
    except ConfigError as error:
        raise ConfigError(
            f"{path} does not cover {cluster.num_instances} instances of tp={cluster.tp}: {error}"
        ) from None
