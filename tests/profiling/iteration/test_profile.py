"""`loongjax profile iteration`: on scripted runtimes for what it decides, on a real one for what it measures."""

import collections
import dataclasses
import gc
import itertools
import os
import statistics
from pathlib import Path

import jax
import pytest

from loongjax.core.cluster import ClusterShape
from loongjax.core.iteration import PrefillIteration, RecoverIteration
from loongjax.costmodel.work import Strategy
from loongjax.errors import ConfigError
from loongjax.runtime.protocol import RuntimeLimits
from loongjax_profiling import command as profile_command
from loongjax_profiling.iteration import agenda, profile
from loongjax_profiling.iteration.case import Case
from loongjax_profiling.iteration.command import IterationCommand
from loongjax_profiling.iteration.database import Database
from loongjax_profiling.iteration.grids import Grid, build_grid
from loongjax_profiling.iteration.meter import IterationFailedError, Timing
from loongjax_profiling.iteration.selection import measurements_of
from loongjax_profiling.iteration.waves import compile_cost
from tests.profiling.iteration.scripted_runtime import ScriptedRuntime

DECODE = Case(kind="decode", strategy=Strategy(1, 1), batch_size=1, input_len=47, num_masters=1)
NUM_DEVICES = 8
"""Virtual ones, of all tests."""


def command_for(db: Path, **settings) -> IterationCommand:
    defaults = {"random_weights": "tiny", "grid": ("figure2",), "shrink": 100, "max_num_seqs": 16, "commit": "0123abc"}
    return IterationCommand(db=db, **(defaults | settings))


def run(db: Path, **settings) -> int:
    return profile.profile_iteration(command_for(db, **settings), "loongjax profile iteration")


def points_in(db: Path) -> dict[Case, float | None]:
    """Seconds, or None of a failed one, by case."""
    with Database(db) as database:
        [system] = database.systems
        return {p.case: None if p.timing is None else p.timing.seconds for p in database.points(system)}


class Builds:
    """Stands for `build_random_runtime`, and remembers what was built."""

    def __init__(self) -> None:
        self.configs = []
        self.runtimes: list[ScriptedRuntime] = []
        self.error = lambda iteration: None
        self.num_pages = 100_000
        self.compile_in_time = lambda keys, timeout_s: set(keys)

    def __call__(self, config, model):
        shape = ClusterShape(
            num_instances=NUM_DEVICES // config.tp, num_pages=self.num_pages, page_size=config.page_size, tp=config.tp
        )
        limits = RuntimeLimits(
            max_model_len=10**6,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_num_seqs=config.max_num_seqs,
            vocab_size=model.vocab_size,
        )
        self.configs.append(config)
        self.runtimes.append(
            ScriptedRuntime(lambda *_: 0.5, lambda iteration: self.error(iteration), shape=shape, limits=limits)
        )
        self.runtimes[-1].compile_in_time = self.compile_in_time
        return self.runtimes[-1]


@pytest.fixture
def builds(monkeypatch):
    builds = Builds()
    monkeypatch.setattr(profile, "build_random_runtime", builds)
    return builds


@pytest.fixture
def db(tmp_path):
    return tmp_path / "points.sqlite"


def test_every_point_of_the_grid_is_measured_and_stored(builds, db, capsys):
    assert run(db) == 0
    grid = build_grid("figure2", num_devices=NUM_DEVICES, shrink=100)
    measurable = {case for case in grid.cases if case.strategy.tp <= 4}
    assert points_in(db) == dict.fromkeys(measurable, 0.5)
    printed = capsys.readouterr().out
    assert f"measured {len(measurable)} points" in printed
    assert f"{len(grid.cases) - len(measurable)} left out: each has a tp that does not divide the model" in printed


def test_each_tp_has_a_runtime_that_is_closed_before_the_next_is_built(builds, db):
    run(db)
    assert [config.tp for config in builds.configs] == [1, 2, 4]
    assert all(runtime.is_closed for runtime in builds.runtimes)


def test_what_is_there_is_not_measured_again(builds, db, capsys):
    run(db)
    before = points_in(db)
    del builds.runtimes[:]
    assert run(db, commit="another") == 0
    assert builds.runtimes == []
    assert points_in(db) == before
    assert "measured 0 points" in capsys.readouterr().out


def test_a_grid_goes_on_where_another_has_ended(builds, db, capsys):
    run(db, grid=("scale-up",))
    first = points_in(db)
    run(db, grid=("figure13",))
    assert first.keys() < points_in(db).keys()
    assert f"{len(first)} left out: each is in the database" in capsys.readouterr().out


def test_a_failed_point_is_stored_with_its_error_and_the_others_are_measured(builds, db, capsys):
    builds.error = lambda iteration: (
        "out of memory" if isinstance(iteration, PrefillIteration) and len(iteration.inputs) == 16 else None
    )
    assert run(db, tp=(1,)) == 1
    points = points_in(db)
    failed = {case for case, seconds in points.items() if seconds is None}
    assert failed == {case for case in points if case.kind == "prefill" and case.batch_size == 16} != set()
    assert len(failed) < len(points)
    assert f"{len(failed)} failed" in capsys.readouterr().out
    with Database(db) as database:
        [system] = database.systems
        assert {point.error for point in database.points(system)} == {None, "out of memory"}


@pytest.mark.parametrize("retries", [False, True])
def test_failed_points_are_measured_again_only_if_asked(builds, db, retries):
    builds.error = lambda iteration: None if isinstance(iteration, RecoverIteration) else "out of memory"
    run(db, tp=(1,))
    assert set(points_in(db).values()) == {None}
    builds.error = lambda iteration: None
    run(db, tp=(1,), retry_failed=retries)
    assert set(points_in(db).values()) == {0.5 if retries else None}


def test_what_does_not_fit_is_counted_by_reason(builds, db, capsys):
    builds.num_pages = 10
    run(db, tp=(1,), max_num_seqs=8)
    printed = capsys.readouterr().out
    assert "left out: each has more requests than --max-num-seqs" in printed
    assert "left out: each does not fit into the KV pool" in printed
    assert all(case.batch_size <= 8 and case.input_len <= 160 for case in points_in(db))


def test_no_runtime_is_built_for_points_that_cannot_fit(builds, db, capsys):
    assert run(db, grid=("figure13",), max_num_seqs=1, num_slots=16) == 0
    assert builds.runtimes == []
    assert "measured 0 points" in capsys.readouterr().out


def test_the_largest_prefill_decides_how_many_tokens_are_batched(builds, db):
    run(db, tp=(2,))
    # 100,000 / 100 = 1000 tokens on one instance.
    assert builds.configs[0].max_num_batched_tokens == 1024
    run(db, tp=(1,), max_num_batched_tokens=300)
    assert builds.configs[1].max_num_batched_tokens == 300
    assert max(case.input_len for case in points_in(db) if case.strategy.tp == 1 and case.kind == "prefill") <= 300


def test_time_that_is_over_leaves_the_rest_for_another_run(builds, db, capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(profile.time, "monotonic", lambda: clock[0])
    measure = profile.Meter.measure

    def measure_and_wait(meter, case):
        clock[0] += 10.0
        return measure(meter, case)

    monkeypatch.setattr(profile.Meter, "measure", measure_and_wait)
    run(db, limit_s=155.0, visits=1)
    # Each of three runtimes has its part of the time, and what one leaves falls to the next.
    counts = [sum(case.strategy.tp == tp for case in points_in(db)) for tp in (1, 2, 4)]
    assert counts == [6, 5, 5]
    assert "were not reached within --limit-s: run it again to go on" in capsys.readouterr().out


def test_a_partial_run_has_measured_all_strategies_and_scales(builds, db, monkeypatch):
    chosen: list[Case] = []
    monkeypatch.setattr(profile._Profile, "_measure_wave", lambda self, meter, wave, *_: chosen.extend(wave))
    run(db, grid=("analytical-model",), tp=(2,), max_num_seqs=256)
    coarse = build_grid("analytical-model", num_devices=NUM_DEVICES, shrink=100).passes[0]
    begin = chosen[: sum(case in coarse for case in chosen)]
    assert set(begin) <= set(coarse)
    assert {case.strategy for case in begin} == {Strategy(sp, 2) for sp in (1, 2, 3, 4)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grid": ()}, "names no group"),
        ({"checkpoint": "."}, "two models"),
        ({"rounds": 0}, "--rounds must be at least 1"),
        ({"limit_s": 0.0}, "--limit-s must be at least 1"),
        ({"limit_s": float("nan")}, "--limit-s must be at least 1"),
        ({"tp": (1, 0)}, "--tp must be at least 1, got 0"),
        ({"page_size": 3}, "--page-size must be a power of two"),
    ],
)
def test_a_command_that_cannot_work_is_refused(db, settings, message):
    with pytest.raises(ConfigError, match=message):
        command_for(db, **settings)


def test_points_of_another_page_size_count_as_measured_and_that_is_said(builds, db, capsys, caplog):
    run(db, page_size=16)
    run(db, page_size=16)
    assert "pages of" not in caplog.text
    run(db, page_size=4)
    assert "measured 0 points" in capsys.readouterr().out
    assert "points of this model with pages of 16 tokens, which count as if measured with pages of 4:" in caplog.text


def test_points_whose_programs_are_not_compiled_in_time_are_left_for_another_run(builds, db, capsys):
    builds.compile_in_time = lambda keys, timeout_s: {key for key in keys if key.name != "prefill"}
    run(db, tp=(1,), limit_s=1000.0)
    assert {case.kind for case in points_in(db)} == {"decode"}
    # 8 prefills, of which shrunk lengths make two pairs equal.
    assert "6 were not reached within --limit-s" in capsys.readouterr().out
    builds.compile_in_time = lambda keys, timeout_s: set(keys)
    run(db, tp=(1,))
    assert {case.kind for case in points_in(db)} == {"prefill", "decode"}


def test_decodes_are_visited_with_others_in_between_so_that_a_bad_moment_is_outvoted(builds, db, monkeypatch):
    measure = profile.Meter.measure
    visited: list[Case] = []

    def measure_on_a_host_that_is_slow_at_first(meter, case):
        visited.append(case)
        timing = measure(meter, case)
        return dataclasses.replace(timing, seconds=timing.seconds + (3.0 if len(visited) <= 12 else 0.0))

    monkeypatch.setattr(profile.Meter, "measure", measure_on_a_host_that_is_slow_at_first)
    decodes = [dataclasses.replace(DECODE, input_len=input_len) for input_len in range(100, 115)]
    prefill = Case(kind="prefill", strategy=Strategy(1, 1), batch_size=1, input_len=100)
    monkeypatch.setattr(agenda, "build_grid", lambda *_, **__: Grid(passes=((prefill, *decodes),)))
    run(db, tp=(1,))
    assert collections.Counter(visited) == {prefill: 1, **dict.fromkeys(decodes, 3)}
    assert all(first != second for first, second in itertools.pairwise(visited))
    assert {points_in(db)[case] for case in decodes} == {0.5}


def test_each_visit_is_stored_before_the_next(builds, db, monkeypatch):
    measure = profile.Meter.measure
    seconds = iter([1.0, 5.0, 2.0])
    stored: list[list[float | None]] = []

    def measure_after_a_look(meter, case):
        stored.append(list(points_in(db).values()) if stored else [])
        return dataclasses.replace(measure(meter, case), seconds=next(seconds))

    monkeypatch.setattr(profile.Meter, "measure", measure_after_a_look)
    monkeypatch.setattr(agenda, "build_grid", lambda *_, **__: Grid(passes=((DECODE,),)))
    run(db, tp=(1,))
    assert stored == [[], [1.0], [3.0]]
    assert points_in(db) == {DECODE: 2.0}
    with Database(db) as database:
        [system] = database.systems
        [point] = database.points(system)
    assert point.timing == Timing(seconds=2.0, stddev_s=statistics.stdev([1.0, 5.0, 2.0]), num_rounds=24, keys=(53,))


def test_a_point_that_fails_on_a_later_visit_has_failed(builds, db, monkeypatch):
    measure = profile.Meter.measure
    visits: list[Case] = []

    def fail_the_second_time(meter, case):
        visits.append(case)
        if len(visits) == 2:
            raise IterationFailedError("out of memory")
        return measure(meter, case)

    monkeypatch.setattr(profile.Meter, "measure", fail_the_second_time)
    monkeypatch.setattr(agenda, "build_grid", lambda *_, **__: Grid(passes=((DECODE,),)))
    assert run(db, tp=(1,)) == 1
    assert visits == [DECODE, DECODE]
    assert points_in(db) == {DECODE: None}


def test_ctrl_c_keeps_what_is_measured_and_says_so(builds, db, capsys, monkeypatch):
    measure = profile.Meter.measure
    measured = []

    def measure_five(meter, case):
        if len(measured) == 5:
            raise KeyboardInterrupt
        measured.append(case)
        return measure(meter, case)

    monkeypatch.setattr(profile.Meter, "measure", measure_five)
    with pytest.raises(KeyboardInterrupt):
        run(db, visits=1)
    assert builds.runtimes[0].is_closed
    assert points_in(db).keys() == set(measured)
    printed = capsys.readouterr().out
    assert "stopped early: run it again to go on" in printed
    assert "measured 5 points" in printed
    monkeypatch.setattr(profile.Meter, "measure", measure)
    assert run(db) == 0
    assert "5 left out: each is in the database" in capsys.readouterr().out


def test_instances_that_cannot_be_built_do_not_keep_others_from_being_measured(builds, db, capsys, monkeypatch):
    def only_larger(config, model):
        if config.tp == 1:
            raise ConfigError("no memory is left for a KV pool")
        return builds(config, model)

    monkeypatch.setattr(profile, "build_random_runtime", only_larger)
    assert run(db) == 0
    assert {case.strategy.tp for case in points_in(db)} == {2, 4}
    assert "tp1: nothing can be measured: no memory is left for a KV pool" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="no memory is left"):
        run(db, tp=(1,))


def test_weights_that_no_memory_holds_are_refused_on_cpu(builds, db, monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: 4096 if name == "SC_PAGE_SIZE" else 1000)
    with pytest.raises(ConfigError, match=r"instances on CPU take .* this machine has 0 GB: lower --num-cpu-devices"):
        run(db, num_slots=10_000)
    assert builds.runtimes == []


def test_programs_that_would_come_too_late_are_not_begun(builds, db, capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(profile.time, "monotonic", lambda: clock[0])

    def compile_slowly(keys, timeout_s):
        clock[0] += 100.0 * compile_cost(keys)
        return set(keys)

    builds.compile_in_time = compile_slowly
    run(db, tp=(1,), grid=("tp-base",), limit_s=200.0)
    assert 100.0 < clock[0] < 200.0
    assert len({case.kind for case in points_in(db)}) == 1, "there was no time for another program of the model"
    assert "were not reached within --limit-s" in capsys.readouterr().out


def test_each_program_is_compiled_once(builds, db):
    run(db, tp=(1,), grid=("tp-base",))
    keys = [key for wave in builds.runtimes[0].compiled for key in wave]
    assert len(keys) == len(set(keys)) > 0
    assert len(points_in(db)) > 2 * len(keys)


@pytest.fixture(scope="module")
def num_recompiles() -> list[int]:
    """What real runtimes built or loaded while each point was measured."""
    return []


@pytest.fixture(scope="module")
def measured(tmp_path_factory, num_recompiles) -> Path:
    """Points of a real runtime: four instances of two virtual devices."""
    measure = profile.Meter.measure

    def measure_and_count(self, case):
        before = self._runtime.num_recompiles
        try:
            return measure(self, case)
        finally:
            num_recompiles.append(self._runtime.num_recompiles - before)

    folder = tmp_path_factory.mktemp("measured")
    db = folder / "points.sqlite"
    arguments = [
        "iteration", "--random-weights", "tiny", "--grid", "figure13", "toy", "--db", str(db), "--shrink", "4000",
        "--max-num-seqs", "2", "--num-slots", "2048", "--num-steps", "3", "--rounds", "2",
        "--compilation-cache-dir", str(folder / "xla"),
    ]  # fmt: skip
    environment = dict(os.environ)
    live = sum(array.nbytes for array in jax.live_arrays())
    profile.Meter.measure = measure_and_count
    try:
        assert profile_command.main(arguments) == 0
    finally:
        profile.Meter.measure = measure
        os.environ.clear()
        os.environ.update(environment)
    gc.collect()
    assert sum(array.nbytes for array in jax.live_arrays()) <= live, "the runtime's memory is free"
    return db


def test_a_real_runtime_is_measured_in_prefill_and_decode_scaled_down_and_up(measured):
    points = points_in(measured)
    assert {case.strategy for case in points} == {Strategy(4, 2)}
    assert {case.num_masters for case in points} == {0, 1, 2, 4}
    assert {case.scales_down for case in points} == {False, True}
    assert all(seconds is not None and 0.0 < seconds < 60.0 for seconds in points.values())
    assert {(case.batch_size, case.input_len) for case in points if case.kind == "prefill"} == {
        (2, 25),
        (1, 50),
        (1, 1),
    }


def test_a_real_runtime_is_measured_in_chunks_beside_decodes(tmp_path):
    db = tmp_path / "points.sqlite"
    settings = {"grid": ("chunks",), "shrink": 500, "tp": (2,), "max_num_seqs": 5, "num_slots": 2048, "rounds": 1}
    assert run(db, compilation_cache_dir=str(tmp_path / "xla"), **settings) == 0
    points = points_in(db)
    assert all(seconds is not None and 0.0 < seconds < 60.0 for seconds in points.values())
    assert {(case.batch_size, case.num_decodes) for case in points} == {(1, 0), (4, 0), (1, 4)}
    assert {case.past_len for case in points} == {1, 2, 10, 20, 100, 200, 400}
    with Database(db) as database:
        [system] = database.systems
        measured = measurements_of(database, system)
    assert all(point.work.is_extend for point in measured.prefills)


def test_nothing_is_compiled_while_a_point_is_measured(measured, num_recompiles):
    assert len(num_recompiles) >= len(points_in(measured))
    assert set(num_recompiles) == {0}


def test_a_run_says_where_it_comes_from(measured):
    with Database(measured) as database:
        [system] = database.systems
        [stored] = database.runs(system)
    assert system.device == jax.devices()[0].device_kind
    assert system.model.hidden_size == 64
    assert system.model.dtype_bytes == 4
    assert stored.command.startswith("loongjax profile iteration --random-weights tiny --grid figure13 toy --db ")
    assert stored.num_devices == NUM_DEVICES
    assert stored.model_name == "tiny, random weights"
    assert stored.page_size == 16
    assert stored.padding.row_buckets == (1, 2)
    assert stored.padding.token_buckets[0] == 64
