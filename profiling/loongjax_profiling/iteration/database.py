"""Measured points in an SQLite file, which grows over many runs, machines and models."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import pathlib
import sqlite3
from collections.abc import Iterator, Sequence

from loongjax.costmodel.measurement import Padding
from loongjax.costmodel.model_shape import ModelShape
from loongjax.costmodel.work import Strategy
from loongjax.errors import ConfigError
from loongjax_profiling.iteration.case import Case, kind_of
from loongjax_profiling.iteration.columns import model_shape, seconds, text, whole, wholes
from loongjax_profiling.iteration.meter import Timing

APPLICATION_ID = 0x6C6F6F6E
"""What SQLite keeps in the file's head to say whose it is: "loon"."""
LEAST_S = 1e-12
"""No iteration is faster."""
PATIENCE_S = 30.0
"""How long a statement waits for another process that writes."""
VERSION = 2
"""Of the tables. Version 1 knew no extends; a file of it is brought up to this one when it is opened."""

POINTS = """
CREATE TABLE points (
  id INTEGER PRIMARY KEY,
  system_id INTEGER NOT NULL REFERENCES systems (id),
  run_id INTEGER NOT NULL REFERENCES runs (id),
  kind TEXT NOT NULL CHECK (kind IN ('prefill', 'decode', 'extend', 'migration')),
  sp INTEGER NOT NULL,
  tp INTEGER NOT NULL,
  batch_size INTEGER NOT NULL,
  input_len INTEGER NOT NULL,
  num_masters INTEGER NOT NULL,   -- 0 but in decodes
  scales_down INTEGER NOT NULL,   -- 0 but in prefills that leave their keys on the fewest instances
  past_len INTEGER NOT NULL,      -- 0 but in extends
  num_decodes INTEGER NOT NULL,   -- 0 but in extends beside decodes
  seconds REAL,                   -- median; NULL: failed
  stddev_s REAL,
  num_rounds INTEGER,
  keys TEXT,                      -- of a decode, on each instance, JSON
  error TEXT,                     -- why it failed
  CHECK ((seconds IS NULL) != (error IS NULL)),
  UNIQUE (system_id, kind, sp, tp, batch_size, input_len, num_masters, scales_down, past_len, num_decodes)
);
"""
UPGRADE = f"""
ALTER TABLE points RENAME TO points_1;
{POINTS.strip()}
INSERT INTO points SELECT id, system_id, run_id, kind, sp, tp, batch_size, input_len, num_masters, scales_down, 0, 0,
  seconds, stddev_s, num_rounds, keys, error FROM points_1;
DROP TABLE points_1;
PRAGMA user_version = {VERSION};
"""

TABLES = f"""
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {VERSION};
CREATE TABLE systems (
  id INTEGER PRIMARY KEY,
  device TEXT NOT NULL,       -- as the device names itself
  model TEXT NOT NULL,        -- its shape, JSON
  UNIQUE (device, model)
);
CREATE TABLE runs (
  id INTEGER PRIMARY KEY,
  system_id INTEGER NOT NULL REFERENCES systems (id),
  started_at TEXT NOT NULL,   -- UTC
  num_devices INTEGER NOT NULL,
  model_name TEXT NOT NULL,
  commit_id TEXT,             -- of this project; NULL: unknown
  jax TEXT NOT NULL,
  command TEXT NOT NULL,
  page_size INTEGER NOT NULL,
  token_buckets TEXT NOT NULL,  -- JSON
  row_buckets TEXT NOT NULL     -- JSON
);
{POINTS.strip()}
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class System:
    """What a point's time holds for, whichever commit measured it on however many devices."""

    device: str
    model: ModelShape

    def __str__(self) -> str:
        return f"{self.device}, {self.shape}"

    @property
    def shape(self) -> str:
        """The model's, in words."""
        model = self.model
        return (
            f"{model.num_layers} layers of {model.hidden_size}, {model.num_q_heads}/{model.num_kv_heads} heads, "
            f"{8 * model.dtype_bytes}-bit"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One start of the profiler."""

    num_devices: int
    model_name: str
    commit: str | None
    jax: str
    command: str
    page_size: int
    padding: Padding
    """Sizes to which it padded."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """A case with its time, or with why there is none."""

    case: Case
    timing: Timing | None = None
    error: str | None = None

    def __post_init__(self) -> None:
        assert (self.timing is None) != (self.error is None), self


class Database:
    """Points by system and case: a case measured again replaces what was there.

    Raises:
        ConfigError: the file cannot be opened, is something else, or of another version.
    """

    def __init__(self, path: pathlib.Path, *, create: bool = False) -> None:
        if not create and not path.is_file():
            raise ConfigError(f"there is no database {path}: `loongjax profile iteration --db {path}` makes one")
        try:
            if create:
                path.parent.mkdir(parents=True, exist_ok=True)
            # Every statement is its own transaction: a point is on disk at once.
            self._connection = sqlite3.connect(path, isolation_level=None, timeout=PATIENCE_S)
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"{path} cannot be used as a database of points: {error}") from None
        self.path = path
        """Of the file."""
        try:
            self._open(create=create)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Database:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        self._connection.close()

    @property
    def systems(self) -> tuple[System, ...]:
        systems = []
        for row_id, device, model in self._rows("SELECT id, device, model FROM systems ORDER BY id"):
            with self._reading("systems", row_id):
                systems.append(System(device=text(device, "device"), model=model_shape(model, "model")))
        return tuple(systems)

    def begin_run(self, system: System, run: Run) -> int:
        """Notes a start of the profiler, and returns what its points are added under."""
        system_id = self._system_id(system, create=True)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        values = (
            system_id,
            now,
            run.num_devices,
            run.model_name,
            run.commit,
            run.jax,
            run.command,
            run.page_size,
            json.dumps(run.padding.token_buckets),
            json.dumps(run.padding.row_buckets),
        )
        columns = (
            "system_id, started_at, num_devices, model_name, commit_id, jax, command, page_size, "
            "token_buckets, row_buckets"
        )
        [(run_id,)] = self._rows(f"INSERT INTO runs ({columns}) VALUES ({_marks(values)}) RETURNING id", values)
        return run_id

    def add(self, run_id: int, point: Point) -> None:
        """Stores a point; it is on disk when this returns."""
        case, timing = point.case, point.timing
        key = _key(case)
        measured = (None, None, None, None)
        if timing is not None:
            keys = json.dumps(timing.keys) if timing.keys else None
            measured = (timing.seconds, timing.stddev_s, timing.num_rounds, keys)
        columns = f"run_id, {', '.join(key)}, seconds, stddev_s, num_rounds, keys, error, system_id"
        values = (run_id, *key.values(), *measured, point.error, run_id)
        marks = f"{_marks(values[:-1])}, (SELECT system_id FROM runs WHERE id = ?)"
        self._rows(f"INSERT OR REPLACE INTO points ({columns}) VALUES ({marks})", values)

    def points(self, system: System) -> list[Point]:
        """Everything known of this system, in order of measurement."""
        return [point for point, _ in self.points_and_runs(system)]

    def points_and_runs(self, system: System) -> list[tuple[Point, Run]]:
        """As `points`, each with the run that it is from."""
        columns = (
            "id, run_id, kind, sp, tp, batch_size, input_len, num_masters, scales_down, past_len, num_decodes, "
            "seconds, stddev_s, num_rounds, keys, error"
        )
        rows = self._rows(f"SELECT {columns} FROM points WHERE system_id = ? ORDER BY id", (self._system_id(system),))
        runs = self._runs(system)
        found = []
        for row_id, run_id, *row in rows:
            with self._reading("points", row_id):
                if run_id not in runs:
                    raise ValueError(f"it is of run {run_id!r}, which is not there")
                found.append((_point(row), runs[run_id]))
        return found

    def runs(self, system: System) -> list[Run]:
        """The runs that points of this system are from, oldest first."""
        rows = self._rows("SELECT DISTINCT run_id FROM points WHERE system_id = ?", (self._system_id(system),))
        used, runs = {run_id for (run_id,) in rows}, self._runs(system)
        if missing := used - runs.keys():
            raise ConfigError(f"{self.path} cannot be used: it has points of run {missing.pop()!r}, which is not there")
        return [run for run_id, run in runs.items() if run_id in used]

    def _runs(self, system: System) -> dict[int, Run]:
        """By id. No profiler deletes any, so a point that was read before has its run here, whatever else happens."""
        columns = "id, num_devices, model_name, commit_id, jax, command, page_size, token_buckets, row_buckets"
        rows = self._rows(
            f"SELECT {columns} FROM runs WHERE system_id = ? ORDER BY id",
            (self._system_id(system),),
        )
        runs = {}
        for run_id, *row in rows:
            with self._reading("runs", run_id):
                runs[run_id] = _run(row)
        return runs

    @contextlib.contextmanager
    def _reading(self, table: str, row_id: int) -> Iterator[None]:
        """Says of which row it is that something cannot be."""
        try:
            yield
        except (ConfigError, ValueError) as error:
            raise ConfigError(
                f"{self.path} cannot be used: row {row_id} of its table {table} is wrong: {error}"
            ) from None

    def _open(self, *, create: bool) -> None:
        if create:
            with self._transaction():  # another profiler may be making the tables
                if not self._rows("SELECT name FROM sqlite_master"):
                    self._run(TABLES)
        if not self._rows("SELECT name FROM sqlite_master"):
            raise ConfigError(f"{self.path} is empty: `loongjax profile iteration --db {self.path}` measures points")
        [(application_id,)] = self._rows("PRAGMA application_id")
        if application_id != APPLICATION_ID:
            raise ConfigError(f"{self.path} is a database of something else: give --db another file")
        if self._version == 1:
            with self._transaction():
                if self._version == 1:  # no other program was faster
                    self._run(UPGRADE)
        if self._version != VERSION:
            raise ConfigError(
                f"{self.path} has tables of version {self._version}, and this program reads {VERSION}: "
                "measure into a new file, or use the version of loongjax that wrote it"
            )

    @property
    def _version(self) -> int:
        [(version,)] = self._rows("PRAGMA user_version")
        return version

    def _run(self, script: str) -> None:
        for statement in script.split(";\n"):
            self._rows(statement)

    def _rows(self, statement: str, values: Sequence[object] = ()) -> list[tuple]:
        """Of one statement, which is its own transaction outside of any."""
        try:
            return self._connection.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            advice = " (another process writes to it: try again later)" if "locked" in str(error) else ""
            raise ConfigError(f"{self.path} cannot be used as a database of points: {error}{advice}") from None

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._rows("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._connection.rollback()
            raise
        self._rows("COMMIT")

    def _system_id(self, system: System, *, create: bool = False) -> int | None:
        values = (system.device, json.dumps(dataclasses.asdict(system.model), sort_keys=True))
        if create:
            self._rows("INSERT OR IGNORE INTO systems (device, model) VALUES (?, ?)", values)
        rows = self._rows("SELECT id FROM systems WHERE device = ? AND model = ?", values)
        return rows[0][0] if rows else None


def _key(case: Case) -> dict[str, str | int]:
    """The columns that identify a case."""
    return {
        "kind": case.kind,
        "sp": case.strategy.sp,
        "tp": case.strategy.tp,
        "batch_size": case.batch_size,
        "input_len": case.input_len,
        "num_masters": case.num_masters,
        "scales_down": int(case.scales_down),
        "past_len": case.past_len,
        "num_decodes": case.num_decodes,
    }


def _run(row: Sequence[object]) -> Run:
    """Raises ValueError for values that a run does not have."""
    num_devices, model_name, commit, jax, command, page_size, token_buckets, row_buckets = row
    return Run(
        num_devices=whole(num_devices, "num_devices"),
        model_name=text(model_name, "model_name"),
        commit=None if commit is None else text(commit, "commit_id"),
        jax=text(jax, "jax"),
        command=text(command, "command"),
        page_size=whole(page_size, "page_size"),
        padding=Padding(
            token_buckets=wholes(token_buckets, "token_buckets"), row_buckets=wholes(row_buckets, "row_buckets")
        ),
    )


def _point(row: Sequence[object]) -> Point:
    """Raises ValueError or ConfigError for values that a point does not have."""
    kind, sp, tp, batch_size, input_len, num_masters, scales_down, past_len, num_decodes, *measured = row
    median_s, stddev_s, num_rounds, keys, error = measured
    case = Case(
        kind=kind_of(text(kind, "kind")),
        strategy=Strategy(whole(sp, "sp"), whole(tp, "tp")),
        batch_size=whole(batch_size, "batch_size"),
        input_len=whole(input_len, "input_len"),
        num_masters=whole(num_masters, "num_masters"),
        scales_down=bool(whole(scales_down, "scales_down")),
        past_len=whole(past_len, "past_len"),
        num_decodes=whole(num_decodes, "num_decodes"),
    )
    if error is not None:
        return Point(case=case, error=text(error, "error"))
    try:
        timing = Timing(
            seconds=seconds(median_s, "seconds", least=LEAST_S),
            stddev_s=None if stddev_s is None else seconds(stddev_s, "stddev_s", least=0.0),
            num_rounds=whole(num_rounds, "num_rounds"),
            keys=() if keys is None else wholes(keys, "keys"),
        )
    except ValueError as wrong:
        raise ValueError(f"{case}: {wrong}") from None
    return Point(case=case, timing=timing)


def _marks(values: Sequence[object]) -> str:
    return ", ".join("?" * len(values))
