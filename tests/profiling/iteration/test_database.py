"""Points in a file: what was put in comes out, once, and only from files that hold such points."""

import dataclasses
import json
import sqlite3
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from loongjax.costmodel.measurement import Padding
from loongjax.costmodel.work import Strategy
from loongjax.errors import ConfigError
from loongjax_profiling.iteration.case import Case
from loongjax_profiling.iteration.database import VERSION, Database, Point, Run, System
from loongjax_profiling.iteration.meter import Timing
from tests.costmodel.shapes import LLAMA2_7B

H200 = System(device="NVIDIA H200", model=LLAMA2_7B)
RUN = Run(
    num_devices=4,
    model_name="llama2-7b, random weights",
    commit="0123abc",
    jax="0.11.2",
    command="loongjax profile iteration",
    page_size=16,
    padding=Padding(token_buckets=(64, 128), row_buckets=(1, 4)),
)
CASE = Case(kind="decode", strategy=Strategy(2, 2), batch_size=4, input_len=100, num_masters=2)
TIMING = Timing(seconds=0.25, stddev_s=0.01, num_rounds=16, keys=(210, 212))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "points.sqlite"


def test_what_was_added_is_there_when_it_is_opened_again(path):
    failed = Point(case=dataclasses.replace(CASE, input_len=10**6), error="no memory")
    with Database(path, create=True) as database:
        run_id = database.begin_run(H200, RUN)
        database.add(run_id, Point(case=CASE, timing=TIMING))
        database.add(run_id, failed)
    with Database(path) as database:
        assert database.systems == (H200,)
        assert database.points(H200) == [Point(case=CASE, timing=TIMING), failed]
        assert database.runs(H200) == [RUN]


def test_a_case_measured_again_replaces_what_was_there(path):
    with Database(path, create=True) as database:
        database.add(database.begin_run(H200, RUN), Point(case=CASE, error="no memory"))
        other_run = dataclasses.replace(RUN, commit="4567def")
        database.add(database.begin_run(H200, other_run), Point(case=CASE, timing=TIMING))
        assert database.points(H200) == [Point(case=CASE, timing=TIMING)]
        assert database.runs(H200) == [other_run]


def test_another_profiler_may_replace_a_runs_last_point_while_points_are_read(path, monkeypatch):
    other_run = dataclasses.replace(RUN, commit="4567def")
    with Database(path, create=True) as database, Database(path) as other:
        database.add(database.begin_run(H200, RUN), Point(case=CASE, error="no memory"))
        read_runs = database._runs

        def replace_and_read(system):
            other.add(other.begin_run(system, other_run), Point(case=CASE, timing=TIMING))
            return read_runs(system)

        monkeypatch.setattr(database, "_runs", replace_and_read)
        assert database.points_and_runs(H200) == [(Point(case=CASE, error="no memory"), RUN)]
        monkeypatch.undo()
        assert database.points_and_runs(H200) == [(Point(case=CASE, timing=TIMING), other_run)]


def test_systems_do_not_see_each_others_points(path):
    others = [
        dataclasses.replace(H200, device="NVIDIA H100"),
        dataclasses.replace(H200, model=dataclasses.replace(LLAMA2_7B, num_kv_heads=8)),
    ]
    with Database(path, create=True) as database:
        for index, system in enumerate([H200, *others]):
            timing = dataclasses.replace(TIMING, seconds=1.0 + index)
            database.add(database.begin_run(system, RUN), Point(case=CASE, timing=timing))
        for index, system in enumerate([H200, *others]):
            [point] = database.points(system)
            assert point.timing is not None
            assert point.timing.seconds == 1.0 + index


def test_the_commit_and_the_number_of_devices_do_not_make_another_system(path):
    with Database(path, create=True) as database:
        for commit, num_devices in (("a", 1), ("b", 4), (None, 2)):
            run = dataclasses.replace(RUN, commit=commit, num_devices=num_devices)
            database.begin_run(H200, run)
        assert database.systems == (H200,)


def test_a_system_that_is_not_there_has_no_points(path):
    with Database(path, create=True) as database:
        assert database.points(H200) == []
        assert database.runs(H200) == []


cases = st.builds(
    lambda strategy, batch_size, input_len, kind, number: Case(
        kind=kind,
        strategy=Strategy(1, strategy.tp) if kind == "extend" else strategy,
        batch_size=batch_size,
        input_len=input_len + (kind == "extend"),
        num_masters=min(number, strategy.sp, batch_size) if kind == "decode" else 0,
        scales_down=kind == "prefill" and number == 1,
        past_len=number if kind == "extend" else 0,
        num_decodes=number // 2 if kind == "extend" else 0,
    ),
    st.builds(Strategy, st.integers(1, 8), st.integers(1, 8)),
    st.integers(1, 1024),
    st.integers(1, 500_000),
    st.sampled_from(["prefill", "decode", "extend"]),
    st.integers(1, 8),
)


@given(st.lists(st.tuples(cases, st.floats(1e-9, 1e9)), max_size=8))
def test_every_case_keeps_its_own_latest_time(timed):
    with Database(Path(":memory:"), create=True) as database:
        run_id = database.begin_run(H200, RUN)
        for case, seconds in timed:
            timing = Timing(seconds=seconds, stddev_s=None, num_rounds=1)
            database.add(run_id, Point(case=case, timing=timing))
        found = {point.case: point.timing.seconds for point in database.points(H200) if point.timing is not None}
    assert found == dict(timed)


def version_1(path: Path) -> None:
    """A file as the first version made it, with one point."""
    Database(path, create=True).close()
    connection = sqlite3.connect(path)
    connection.executescript("""
        DROP TABLE points;
        CREATE TABLE points (
          id INTEGER PRIMARY KEY, system_id INTEGER NOT NULL REFERENCES systems (id),
          run_id INTEGER NOT NULL REFERENCES runs (id),
          kind TEXT NOT NULL CHECK (kind IN ('prefill', 'decode', 'migration')),
          sp INTEGER NOT NULL, tp INTEGER NOT NULL, batch_size INTEGER NOT NULL, input_len INTEGER NOT NULL,
          num_masters INTEGER NOT NULL, scales_down INTEGER NOT NULL, seconds REAL, stddev_s REAL, num_rounds INTEGER,
          keys TEXT, error TEXT, CHECK ((seconds IS NULL) != (error IS NULL)),
          UNIQUE (system_id, kind, sp, tp, batch_size, input_len, num_masters, scales_down));
        PRAGMA user_version = 1;
    """)
    connection.close()
    with sqlite3.connect(path) as connection:
        model = json.dumps(dataclasses.asdict(LLAMA2_7B), sort_keys=True)
        connection.execute("INSERT INTO systems VALUES (1, ?, ?)", (H200.device, model))
        connection.execute("INSERT INTO runs VALUES (1, 1, 'then', 4, 'x', NULL, '0.11.2', 'y', 16, '[64]', '[1]')")
        point = "(7, 1, 1, 'decode', 2, 2, 4, 100, 2, 0, 0.25, 0.01, 16, '[210, 212]', NULL)"
        connection.execute(f"INSERT INTO points VALUES {point}")
    connection.close()


@pytest.mark.parametrize("create", [False, True])
def test_a_file_of_the_first_version_is_brought_up_to_this_one(path, create):
    version_1(path)
    extend = Point(
        case=Case(kind="extend", strategy=Strategy(1), input_len=50, past_len=900, num_decodes=3), error="no memory"
    )
    for _ in range(2):
        with Database(path, create=create) as database:
            assert database.points(H200)[0] == Point(case=CASE, timing=TIMING)
            database.add(1, extend)
            assert database.points(H200)[1:] == [extend]


def test_a_database_that_is_not_there_is_only_made_if_asked(path):
    with pytest.raises(ConfigError, match=r"profile iteration --db .* makes one"):
        Database(path)
    assert not path.exists()


def test_an_empty_file_is_filled_only_if_asked(path):
    path.touch()
    with pytest.raises(ConfigError, match="is empty: `loongjax profile iteration"):
        Database(path)
    assert path.read_bytes() == b""
    Database(path, create=True).close()
    with Database(path) as database:
        assert database.systems == ()


def test_two_profilers_write_to_one_file(path):
    with Database(path, create=True) as first, Database(path, create=True) as second:
        for seconds, database in ((1.0, first), (2.0, second)):
            timing = dataclasses.replace(TIMING, seconds=seconds)
            own = dataclasses.replace(CASE, input_len=int(100 * seconds))
            run_id = database.begin_run(H200, RUN)
            database.add(run_id, Point(case=CASE, timing=timing))
            database.add(run_id, Point(case=own, timing=timing))
        found = {p.case.input_len: p.timing.seconds for p in first.points(H200) if p.timing is not None}
    assert found == {100: 2.0, 200: 2.0}, "the later one replaced what both measured"


def test_a_file_that_another_process_keeps_locked_is_said_so(path, monkeypatch):
    monkeypatch.setattr("loongjax_profiling.iteration.database.PATIENCE_S", 0.01)
    with Database(path, create=True) as database:
        run_id = database.begin_run(H200, RUN)
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(ConfigError, match=r"locked.*try again later"):
            database.add(run_id, Point(case=CASE, timing=TIMING))
        with pytest.raises(ConfigError, match=r"locked.*try again later"):
            Database(path)
        other.close()
        database.add(run_id, Point(case=CASE, timing=TIMING))
        assert len(database.points(H200)) == 1


def test_a_file_that_was_cut_off_is_refused(path):
    with Database(path, create=True) as database:
        run_id = database.begin_run(H200, RUN)
        for input_len in range(1, 200):
            database.add(run_id, Point(case=dataclasses.replace(CASE, input_len=input_len), timing=TIMING))
    path.write_bytes(path.read_bytes()[:12_288])
    with pytest.raises(ConfigError, match="cannot be used"), Database(path) as database:
        database.points(H200)


def test_a_file_that_is_no_database_is_refused_and_left_alone(path):
    path.write_text("not a database, but a text that is longer than the head of one\n" * 4)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="cannot be used"):
        Database(path, create=True)
    assert path.read_bytes() == before


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be used"):
        Database(tmp_path / "file" / "points.sqlite", create=True)


def test_a_database_of_something_else_is_refused(path):
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE points (x)")
    connection.close()
    with pytest.raises(ConfigError, match="something else"):
        Database(path, create=True)


@pytest.mark.parametrize("version", [0, VERSION + 1])
def test_another_version_is_refused_by_number(path, version):
    Database(path, create=True).close()
    with sqlite3.connect(path) as connection:
        connection.execute(f"PRAGMA user_version = {version}")
    connection.close()
    with pytest.raises(ConfigError, match=f"version {version}, and this program reads {VERSION}"):
        Database(path)


def test_a_point_is_measured_or_failed():
    with pytest.raises(AssertionError):
        Point(case=CASE)
    with pytest.raises(AssertionError):
        Point(case=CASE, timing=TIMING, error="both")
