"""`loongjax profile iteration`: one runtime after the other, each measuring what of the grid it can."""

from __future__ import annotations

import functools
import gc
import itertools
import logging
import math
import time
from collections.abc import Sequence

import jax
from tqdm import tqdm

from loongjax.config import CPU_NUM_SLOTS, EngineConfig
from loongjax.costmodel.measurement import Padding
from loongjax.costmodel.roofline import DeviceRates, RooflineModel
from loongjax.engine.cost_model import cost_shape
from loongjax.errors import ConfigError
from loongjax.models.config import ModelConfig
from loongjax.models.shipped import resolve_checkpoint
from loongjax.runtime.buckets import Buckets
from loongjax.runtime.build import build_runtime
from loongjax.runtime.compilation import num_compile_threads
from loongjax.runtime.model_spec import ModelSpec
from loongjax.runtime.program_calls import ProgramKey
from loongjax.runtime.protocol import Runtime
from loongjax.runtime.sizing import resolve_dtype
from loongjax_profiling.compiling_runtime import CompilingRuntime
from loongjax_profiling.iteration.agenda import Agenda
from loongjax_profiling.iteration.case import Case
from loongjax_profiling.iteration.command import IterationCommand
from loongjax_profiling.iteration.database import Database, Point, Run, System
from loongjax_profiling.iteration.host_memory import check_host_memory
from loongjax_profiling.iteration.meter import IterationFailedError, Meter, MeterConfig, Timing
from loongjax_profiling.iteration.pace import CompilePace
from loongjax_profiling.iteration.waves import compile_cost, programs_of, waves_of
from loongjax_profiling.provenance import checked_out_commit
from loongjax_profiling.random_runtime import build_random_runtime
from loongjax_profiling.shapes import named_shape

logger = logging.getLogger(__name__)


def profile_iteration(command: IterationCommand, command_line: str) -> int:
    """Measures, stores, and prints what it does; `command_line` is stored too. Returns 1 if a point failed, else 0.

    Raises:
        ConfigError: a model, grid or database that cannot work.
        DevicesLostError: the devices do not answer any more; what was measured is stored.
    """
    with Database(command.db, create=True) as database:
        profile = _Profile(command, command_line, database)
        profile.run()
        return int(profile.num_failed > 0)


class _Profile:
    def __init__(self, command: IterationCommand, command_line: str, database: Database) -> None:
        self._command = command
        self._command_line = command_line
        self._database = database
        devices = jax.devices()
        self._num_devices = len(devices)
        self._platform = devices[0].platform
        self._model, self._model_name = _model_of(command)
        config = command.engine_config(tp=1, max_num_batched_tokens=1)
        spec = ModelSpec(self._model, resolve_dtype(config, self._model.dtype, self._platform))
        self._system = System(device=devices[0].device_kind, model=cost_shape(spec))
        self._estimate = RooflineModel(rates=DeviceRates.of_device(self._system.device), model=self._system.model)
        self._agenda = Agenda(command, self._model, num_devices=self._num_devices, platform=self._platform)
        self._pace = CompilePace(num_compile_threads())
        self._points: dict[Case, Point] = {}
        """What was measured, failed ones too."""
        self._num_not_reached = 0

    @property
    def num_failed(self) -> int:
        """Points."""
        return sum(point.error is not None for point in self._points.values())

    def run(self) -> None:
        started_s = time.monotonic()
        passes = self._agenda.passes(self._known())
        num_cases = sum(map(len, passes))
        print(
            f"{', '.join(self._command.grid)} of {self._model_name} on {self._num_devices} x {self._system.device}: "
            f"{num_cases} points are to be measured",
            flush=True,
        )
        try:
            self._measure_all(passes, started_s)
        except KeyboardInterrupt:
            print("stopped early: run it again to go on; what is measured stays in the database")
            raise
        finally:
            self._report(time.monotonic() - started_s)

    def _measure_all(self, passes: Sequence[Sequence[Case]], started_s: float) -> None:
        """One runtime after the other. Raises ConfigError if none of them could be built."""
        tps = sorted({case.strategy.tp for cases in passes for case in cases})
        errors: list[ConfigError] = []
        for index, tp in enumerate(tps):
            deadline_s = math.inf
            if self._command.limit_s is not None:
                left_s = started_s + self._command.limit_s - time.monotonic()
                deadline_s = time.monotonic() + left_s / (len(tps) - index)
            mine = [[case for case in cases if case.strategy.tp == tp] for cases in passes]
            try:
                self._measure_with(tp, mine, deadline_s)
            except ConfigError as error:  # larger instances may have the room that these lack
                print(f"tp{tp}: nothing can be measured: {error}", flush=True)
                errors.append(error)
            # The next runtime needs the memory of this one's weights, pool and executables.
            gc.collect()
            jax.clear_caches()
        if errors and len(errors) == len(tps):
            raise errors[-1]

    def _known(self) -> set[Case]:
        """What is not to be measured again."""
        found = self._database.points_and_runs(self._system)
        if others := {run.page_size for _, run in found} - {self._command.page_size}:
            logger.warning(
                "%s has points of this model with pages of %s tokens, which count as if measured with pages of %d: "
                "give each page size its own --db",
                self._command.db,
                ", ".join(map(str, sorted(others))),
                self._command.page_size,
            )
        return {point.case for point, _ in found if point.error is None or not self._command.retry_failed}

    def _measure_with(self, tp: int, passes: Sequence[Sequence[Case]], deadline_s: float) -> None:
        """Measures with instances of `tp` devices, until the deadline on the monotonic clock."""
        started_s = time.monotonic()
        cases = list(itertools.chain.from_iterable(passes))
        config = self._command.engine_config(
            tp=tp,
            max_num_batched_tokens=self._agenda.max_num_batched_tokens(cases),
            max_extend_tokens=max((case.num_tokens for case in cases if case.kind == "extend"), default=None),
        )
        runtime = self._build(config)
        try:
            meter = Meter(runtime, MeterConfig(rounds=self._command.rounds, num_steps=self._command.num_steps))
            fitting = [self._agenda.fitting(cases, runtime.shape, runtime.limits) for cases in passes]
            num_cases = sum(map(len, fitting))
            print(
                f"tp{tp}: ready after {time.monotonic() - started_s:.1f} s, {runtime.shape.num_instances} instances of "
                f"{runtime.shape.num_slots} tokens; {num_cases} points",
                flush=True,
            )
            run_id = self._database.begin_run(self._system, self._run_of(runtime))
            needs = functools.partial(programs_of, buckets=Buckets.of(runtime.shape, runtime.limits))
            compiled: set[ProgramKey] = set()
            with tqdm(total=num_cases, desc=f"Iterations, tp{tp}", unit="point", disable=None) as bar:
                for wave in waves_of(
                    fitting, needs, self._expected_s, width=lambda: self._pace.width(deadline_s - time.monotonic())
                ):
                    needed = dict.fromkeys(itertools.chain.from_iterable(map(needs, wave)))
                    compiled |= self._compile(runtime, [key for key in needed if key not in compiled], deadline_s)
                    ready = [case for case in wave if compiled.issuperset(needs(case))]
                    self._num_not_reached += len(wave) - len(ready)
                    bar.update(len(wave) - len(ready))
                    self._measure_wave(meter, ready, run_id, deadline_s, bar)
            print(f"tp{tp}: over after {time.monotonic() - started_s:.1f} s", flush=True)
        finally:
            runtime.close()

    def _compile(self, runtime: CompilingRuntime, keys: Sequence[ProgramKey], deadline_s: float) -> set[ProgramKey]:
        """Compiles these, and returns which of them are there; what would come too late is not begun."""
        started_s = time.monotonic()
        left_s = deadline_s - started_s
        if not keys or left_s <= self._pace.expected_s(compile_cost(keys)):
            return set()
        compiled = runtime.compile(keys, timeout_s=self._pace.timeout_s(left_s))
        self._pace.note(compile_cost(compiled), time.monotonic() - started_s)
        return compiled

    def _measure_wave(self, meter: Meter, wave: Sequence[Case], run_id: int, deadline_s: float, bar: tqdm) -> None:
        """Decodes are visited again after all others: their steps are so short that a bad moment of the host is in all
        steps of a visit. What is known of a point is stored after each visit.
        """
        decodes = [case for case in wave if case.kind == "decode"]
        timings: dict[Case, list[Timing]] = {case: [] for case in wave}
        for index, case in enumerate(itertools.chain(wave, *[decodes] * (self._command.visits - 1))):
            known = self._points.get(case)
            has_failed = known is not None and known.error is not None
            if not has_failed and time.monotonic() + self._expected_s(case) <= deadline_s:
                try:
                    timings[case].append(meter.measure(case))
                    point = Point(case=case, timing=Timing.of_visits(timings[case]))
                except IterationFailedError as error:
                    logger.warning("%s failed: %s", case, error)
                    point = Point(case=case, error=str(error)[:1000])
                self._points[case] = point
                self._database.add(run_id, point)
            bar.update(index < len(wave))
        self._num_not_reached += len(set(wave) - self._points.keys())

    def _expected_s(self, case: Case) -> float:
        """Of one visit, at the least, by roofline: only to order and to stop in time."""
        match case.kind:
            case "prefill" | "extend":
                return 2 * self._estimate.prefill_s(case.strategy, case.prefill_work.totals).item()
            case "decode":
                return self._command.num_steps * self._estimate.decode_s(case.strategy, case.decode_totals).item()
            case "migration":
                return 2 * self._estimate.migration_s(case.input_len, case.strategy.tp)

    def _build(self, config: EngineConfig) -> CompilingRuntime:
        if self._platform == "cpu":
            check_host_memory(
                self._system.model,
                num_instances=self._num_devices // config.tp,
                num_slots=config.num_slots or CPU_NUM_SLOTS,
            )
        return (
            build_runtime(config) if self._command.random_weights is None else build_random_runtime(config, self._model)
        )

    def _run_of(self, runtime: Runtime) -> Run:
        buckets = Buckets.of(runtime.shape, runtime.limits)
        return Run(
            num_devices=self._num_devices,
            model_name=self._model_name,
            commit=self._command.commit or checked_out_commit(),
            jax=jax.__version__,
            command=self._command_line,
            page_size=runtime.shape.page_size,
            padding=Padding(token_buckets=buckets.num_tokens, row_buckets=buckets.num_rows),
        )

    def _report(self, elapsed_s: float) -> None:
        num_measured = len(self._points) - self.num_failed
        print(f"measured {num_measured} points in {elapsed_s:.0f} s; {self.num_failed} failed")
        if self._num_not_reached:
            print(f"  {self._num_not_reached} were not reached within --limit-s: run it again to go on")
        for reason, number in self._agenda.left_out.most_common():
            print(f"  {number} left out: each {reason}")


def _model_of(command: IterationCommand) -> tuple[ModelConfig, str]:
    if command.random_weights is not None:
        return named_shape(command.random_weights), f"{command.random_weights}, random weights"
    folder = resolve_checkpoint(command.checkpoint)
    return ModelConfig.from_checkpoint(folder), folder.name
