"""Systems and workloads from a configuration."""

from __future__ import annotations

import dataclasses
import logging
import pathlib
from collections.abc import Callable

from loongjax.core.request import ServiceLevel
from loongjax.costmodel.model import CostModel, FittedModel
from loongjax.costmodel.model_file import load
from loongjax.costmodel.model_shape import ModelShape
from loongjax.costmodel.roofline import DeviceRates, RooflineModel, known_name, known_names
from loongjax.errors import ConfigError
from loongjax.runtime.buckets import Buckets
from loongjax.runtime.simulated import NO_HOST
from loongjax.scheduler.build import warn_of_unread_settings
from loongjax_profiling.model_shapes import MODEL_SHAPES
from loongjax_profiling.simulate.a800 import a800_model
from loongjax_profiling.simulate.cluster import PRESETS, ClusterSpec, roofline_of
from loongjax_profiling.simulate.config import A800, SimulateConfig
from loongjax_profiling.simulate.host_times import read_host_times
from loongjax_profiling.simulate.simulation import SimulatedSystem
from loongjax_profiling.simulate.workload.config import WorkloadConfig, WorkloadName
from loongjax_profiling.simulate.workload.lengths import LengthDistribution
from loongjax_profiling.simulate.workload.leval import LEvalLengths
from loongjax_profiling.simulate.workload.lveval import LvEvalLengths
from loongjax_profiling.simulate.workload.mixed import MixedLengths
from loongjax_profiling.simulate.workload.mooncake import MooncakeLengths, read_mooncake
from loongjax_profiling.simulate.workload.request import WorkloadRequest
from loongjax_profiling.simulate.workload.sharegpt import ShareGptLengths
from loongjax_profiling.simulate.workload.synthetic import synthesize
from loongjax_profiling.simulate.workload.zipf import ZipfLengths

logger = logging.getLogger(__name__)


def assemble_system(config: SimulateConfig) -> SimulatedSystem:
    """What serves.

    Raises:
        ConfigError: a cluster, a cost model or a file of host times that cannot be.
    """
    warn_of_unread_settings(config)
    cluster = choose_cluster(config)
    return SimulatedSystem(
        cluster=cluster,
        scheduling=config,
        cost_model=choose_cost_model(config, cluster),
        pod_size=config.pod_size,
        step_by_step=config.step_by_step,
        run_ahead=config.run_ahead,
        host=NO_HOST if config.host is None else read_host_times(config.host),
    )


def choose_cluster(config: SimulateConfig) -> ClusterSpec:
    """The preset, with what the configuration names instead."""
    preset = PRESETS[config.cluster].spec
    given = {field.name: getattr(config, field.name) for field in dataclasses.fields(ClusterSpec)}
    return dataclasses.replace(preset, **{name: value for name, value in given.items() if value is not None})


def choose_cost_model(config: SimulateConfig, cluster: ClusterSpec) -> CostModel:
    """The file's, for an engine that pads as this cluster's would; the one that comes with the simulator; a roofline,
    which the log says.

    Raises:
        ConfigError: a file that cannot be read, or a device whose rates are not known.
    """
    if config.cost_model is not None:
        model = _fitted(config.cost_model, cluster)
        _compare(model, config)
        return model
    device, name = roofline_of(config)
    if known_name(device) is None:
        raise ConfigError(
            f"--device must be one of {', '.join(known_names())}, got {device!r}: "
            "--cost-model takes the measured times of others"
        )
    rates = DeviceRates.of_device(device)
    logger.warning("times are estimates: a roofline of %s for %s; --cost-model takes measured ones", rates.name, name)
    return RooflineModel(rates=rates, model=MODEL_SHAPES[name])


def _fitted(cost_model: str, cluster: ClusterSpec) -> FittedModel:
    if cost_model == A800:
        return a800_model(max_instances=cluster.num_instances)
    buckets = Buckets.of(cluster.shape, cluster.limits)
    return load(pathlib.Path(cost_model)).padded_to(buckets.num_tokens, buckets.num_rows)


def _compare(model: FittedModel, config: SimulateConfig) -> None:
    """Warns of flags that a fitted model makes idle, and of a cluster whose memory is another device's or model's."""
    idle = [f"--{name} {value}" for name in ("device", "model") if (value := getattr(config, name)) is not None]
    if idle:
        logger.warning("not read: %s; the times are those of --cost-model %s", " ".join(idle), config.cost_model)
    preset, provenance = PRESETS[config.cluster], model.provenance
    is_same_device = preset.device.upper() in provenance.hardware.upper()
    if config.num_slots is None and not (is_same_device and provenance.model == MODEL_SHAPES[preset.model]):
        logger.warning(
            "--cost-model %s is of %s with %s, and --cluster %s has the memory of %s: choose another one, or give "
            "--num-slots",
            config.cost_model,
            provenance.hardware,
            _name_of(provenance.model),
            config.cluster,
            preset,
        )


def _name_of(shape: ModelShape) -> str:
    return next((name for name, known in MODEL_SHAPES.items() if known == shape), f"a model of another shape, {shape}")


def choose_lengths(name: WorkloadName, zipf_alpha: float) -> LengthDistribution:
    """The distribution of this name."""
    match name:
        case "sharegpt":
            return ShareGptLengths()
        case "leval":
            return LEvalLengths()
        case "lv-eval":
            return LvEvalLengths()
        case "mixed":
            return MixedLengths()
        case "zipf":
            return ZipfLengths(zipf_alpha)
        case "mooncake":
            return MooncakeLengths()


def make_workload(config: WorkloadConfig, tell: Callable[[str], object] = lambda text: None) -> list[WorkloadRequest]:
    """The requests, in order of arrival.

    Args:
        config: which.
        tell: is given what was left out of a trace, in words.

    Raises:
        ConfigError: a rate or a trace that cannot be.
    """
    if config.trace is not None:
        whole = read_mooncake(config.trace, speed=config.trace_speed)
        workload = whole[: config.num_requests]
        if num_left := len(whole) - len(workload):
            tell(
                f"{config.trace}: the first {len(workload)} of {len(whole)} requests, until {workload[-1].arrival_s:g} "
                f"s; --num-requests leaves out {num_left}, until {whole[-1].arrival_s:g} s"
            )
        return workload
    return synthesize(
        choose_lengths(config.workload, config.zipf_alpha),
        rate=config.rate,
        num_requests=config.num_requests or config.USUAL_NUM_REQUESTS,
        cv=config.cv,
        seed=config.seed,
    )


def service_level(config: WorkloadConfig) -> ServiceLevel:
    """What every request wishes for."""
    return ServiceLevel(ttft_s=config.ttft_slo_s, tpot_s=config.tpot_slo_s)
