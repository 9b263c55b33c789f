"""`loongjax fit`: known coefficients come back, and what is printed is what they are worth."""

import dataclasses
import re
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from loongjax.costmodel.fit import fit
from loongjax.costmodel.model_file import load
from loongjax.costmodel.work import DecodeTotals, PrefillTotals, PrefillWork, Strategy
from loongjax.errors import ConfigError
from loongjax_profiling.fit.command import main, split_by_points
from loongjax_profiling.fit.report import format_report, residuals
from loongjax_profiling.iteration.case import Case
from loongjax_profiling.iteration.database import Database, Point
from loongjax_profiling.iteration.grids import build_grid
from loongjax_profiling.iteration.meter import Timing
from tests.costmodel.shapes import LLAMA2_7B, MIGRATION, decode, measurements, refined
from tests.profiling.synthetic import RUN, make_database, model_cases, timed

ONE, TWO, FOUR = Strategy(1), Strategy(2), Strategy(4)


def fit_file(database: Path) -> Path:
    out = database.parent / "models" / "model.json"
    assert main(["--db", str(database), "--out", str(out)]) == 0
    return out


def test_the_times_that_points_came_from_are_recovered(tmp_path):
    model = load(fit_file(make_database(tmp_path / "points.sqlite", model_cases((ONE, TWO, FOUR)))))
    prompts = PrefillTotals.of_sums([5, 12_345, 300_000], [25, 12_345**2, 300_000**2])
    for strategy in (ONE, TWO, FOUR):
        np.testing.assert_allclose(model.prefill_s(strategy, prompts), refined(strategy.sp).seconds(prompts), rtol=1e-6)
        steps = DecodeTotals.even(strategy, [1, 40, 64], [500, 90_000, 10**6], [1, 1, strategy.sp])
        np.testing.assert_allclose(model.decode_s(strategy, steps), decode(strategy.sp).seconds(steps), rtol=1e-6)
    for size in (77, 10**6):
        assert model.migration_s(size, 1) == pytest.approx(MIGRATION.seconds(size, LLAMA2_7B, 1))


def test_what_chunks_take_is_recovered_from_their_grid_and_moves_nothing_else(tmp_path, capsys):
    whole = model_cases((ONE, TWO))
    chunks = [case for case in build_grid("chunks", num_devices=1).cases if case.num_tokens <= 4096]
    plain, model = (
        load(fit_file(make_database(tmp_path / name / "points.sqlite", cases)))
        for name, cases in (("plain", whole), ("chunks", [*whole, *chunks]))
    )
    works = [
        PrefillWork(new_lens=(700,), past_lens=(30_000,)),
        PrefillWork(new_lens=(480, *[1] * 32), past_lens=(9000, *[2000] * 32)),
    ]
    totals = PrefillTotals.of(works)
    expected = refined(1).seconds(totals)
    np.testing.assert_allclose(model.prefill_s(ONE, totals), expected, rtol=1e-6)
    assert (np.abs(plain.prefill_s(ONE, totals) / expected - 1) > 0.01).all(), "else there was nothing to learn"
    assert model.times(ONE).paper_prefill == plain.times(ONE).paper_prefill
    assert model.times(TWO) == plain.times(TWO)
    assert [line[:20].split() for line in capsys.readouterr().out.splitlines() if " tp1   extend" in line] == [
        ["sp1", "tp1", "extend"]
    ]


def test_chunks_alone_are_not_enough_to_fit(tmp_path):
    path = make_database(tmp_path / "points.sqlite", [*build_grid("chunks", num_devices=1).cases])
    with pytest.raises(ConfigError, match="no strategy has 5 prefills and 5 decodes"):
        fit_file(path)


def test_the_file_says_where_it_comes_from(tmp_path):
    model = load(fit_file(make_database(tmp_path / "points.sqlite", model_cases((ONE,)))))
    assert model.provenance.hardware == "4 x NVIDIA H200"
    assert model.provenance.model == LLAMA2_7B
    assert model.provenance.commit == "0123abc"
    errors = model.times(ONE).paper_prefill_errors
    assert errors is not None
    assert errors.held_out is not None


def test_errors_of_both_forms_on_both_kinds_of_points_are_printed(tmp_path, capsys):
    out = fit_file(make_database(tmp_path / "points.sqlite", model_cases((ONE, TWO))))
    printed = capsys.readouterr().out
    errors = load(out).times(TWO).paper_prefill_errors
    assert errors is not None
    assert errors.held_out is not None
    [line] = [line for line in printed.splitlines() if line.startswith("sp2 tp1   prefill, paper")]
    assert re.findall(r"[\d.]+(?=%)", line) == [
        f"{100 * mean:.2f}"
        for part in (errors.training, errors.held_out)
        for mean in (part.arithmetic_mean, part.geometric_mean)
    ]
    for form in ("sp1 tp1   prefill, ours", "sp1 tp1   decode", "sp2 tp1   decode", "all       migration"):
        assert form in printed
    assert "prefill, ours, held out, all strategies:" in printed
    assert str(out) in printed


def test_the_worst_point_is_named_first(tmp_path, capsys):
    cases = model_cases((ONE,))
    wrong = next(case for case in cases if case.kind == "prefill" and (case.batch_size, case.input_len) == (3, 700))

    def time(case: Case) -> Timing:
        return Timing(seconds=9.0, stddev_s=None, num_rounds=1) if case == wrong else timed(case)

    fit_file(make_database(tmp_path / "points.sqlite", cases, time=time))
    worst = capsys.readouterr().out.split("worst points:\n")[1].splitlines()[0]
    assert "prefill of 3 x 700 on sp1 tp1: 9000.000 ms measured" in worst


def test_a_strategy_with_few_points_is_left_out_and_said(tmp_path, capsys):
    few = [Case(kind="prefill", strategy=FOUR, input_len=length) for length in (1, 2, 3)]
    out = fit_file(make_database(tmp_path / "points.sqlite", [*model_cases((ONE,)), *few]))
    assert "left out: sp4 tp1 has 3 prefills and 0 decodes, and a fit needs 5" in capsys.readouterr().out
    assert set(load(out).strategies) == {ONE}


def test_points_that_failed_are_counted_and_how_to_try_them_again_is_said(tmp_path, capsys):
    path = make_database(tmp_path / "points.sqlite", model_cases((ONE,)))
    with Database(path) as database:
        [system] = database.systems
        run_id = database.begin_run(system, RUN)
        failed = [
            dataclasses.replace(point.case, input_len=10**6 + n) for n, point in enumerate(database.points(system))
        ]
        for case in failed[:3]:
            database.add(run_id, Point(case=case, error="no memory"))
    fit_file(path)
    assert "left out: 3 points that failed; `loongjax profile iteration --retry-failed`" in capsys.readouterr().out


def test_a_file_that_cannot_be_written_is_said_first(tmp_path):
    path = make_database(tmp_path / "points.sqlite", model_cases((ONE,)))
    with pytest.raises(ConfigError, match=r"--out .* is a folder"):
        main(["--db", str(path), "--out", str(tmp_path)])


def test_the_database_is_not_overwritten_nor_is_another(tmp_path):
    path, other = (make_database(tmp_path / f"{name}.sqlite", model_cases((ONE,))) for name in "ab")
    before = path.read_bytes(), other.read_bytes()
    with pytest.raises(ConfigError, match=r"--out .* is the file of --db"):
        main(["--db", str(path), "--out", str(path)])
    with pytest.raises(ConfigError, match=r"--out .* is an SQLite database"):
        main(["--db", str(path), "--out", str(other)])
    assert (path.read_bytes(), other.read_bytes()) == before


def test_without_enough_points_nothing_is_written(tmp_path):
    path = make_database(tmp_path / "points.sqlite", model_cases((ONE,))[:4])
    with pytest.raises(ConfigError, match="--grid analytical-model"):
        main(["--db", str(path), "--out", str(tmp_path / "model.json")])
    assert not (tmp_path / "model.json").exists()


DECODE, PREFILL = (f"(SELECT min(id) FROM points WHERE kind = '{kind}')" for kind in ("decode", "prefill"))


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        (
            f"UPDATE points SET keys = '[1,' WHERE id = {DECODE}",
            "of its table points is wrong: decode of .* keys is no JSON",
        ),
        (f"UPDATE points SET keys = '{{}}' WHERE id = {DECODE}", "keys must be a list of whole numbers"),
        (f"UPDATE points SET keys = '[1.5]' WHERE id = {DECODE}", "keys must be a whole number, got 1.5"),
        (
            f"UPDATE points SET keys = NULL WHERE id = {DECODE}",
            r"points\.sqlite, decode of 1 x 10 on sp1 tp1, 1 masters: ",
        ),
        (f"UPDATE points SET keys = x'00' WHERE id = {DECODE}", "keys is no JSON: keys must be a text"),
        (
            f"UPDATE points SET seconds = -1 WHERE id = {PREFILL}",
            "row 1 .* prefill of 1 x 10 on sp1 tp1: seconds must be .* got -1",
        ),
        (
            f"UPDATE points SET seconds = 9e999 WHERE id = {PREFILL}",
            "row 1 .* prefill of 1 x 10 .* seconds must be .* got inf",
        ),
        (f"UPDATE points SET seconds = 'abc' WHERE id = {PREFILL}", "row 1 .* seconds must be .* got 'abc'"),
        (f"UPDATE points SET stddev_s = 'abc' WHERE id = {PREFILL}", "stddev_s must be .* got 'abc'"),
        (f"UPDATE points SET num_rounds = NULL WHERE id = {PREFILL}", "num_rounds must be a whole number, got None"),
        (
            f"UPDATE points SET batch_size = 0 WHERE id = {PREFILL}",
            r"row 1 of its table points .* no such iteration: .*batch_size=0",
        ),
        (f"UPDATE points SET input_len = 'x' WHERE id = {PREFILL}", "input_len must be a whole number, got 'x'"),
        (f"UPDATE points SET sp = -1 WHERE id = {PREFILL}", "row 1 .* at least one instance"),
        (f"UPDATE points SET past_len = -1 WHERE id = {PREFILL}", "no such iteration"),
        (f"UPDATE points SET run_id = 7 WHERE id = {PREFILL}", "points of run 7, which is not there"),
        ("DELETE FROM runs", "points of run 1, which is not there"),
        ("UPDATE runs SET token_buckets = 'x'", "row 1 of its table runs is wrong: token_buckets is no JSON"),
        ("UPDATE runs SET row_buckets = '7'", "row_buckets must be a list of whole numbers, got '7'"),
        ("UPDATE runs SET num_devices = 'many'", "num_devices must be a whole number, got 'many'"),
        (
            "UPDATE systems SET model = '{}'",
            "row 1 of its table systems is wrong: model must be an object of dtype_bytes, ",
        ),
        (
            "UPDATE systems SET model = replace(model, '4096', '\"x\"')",
            "model's hidden_size must be a whole number, got 'x'",
        ),
        ("UPDATE systems SET model = replace(model, '4096', '0')", "row 1 .* hidden_size of a model's shape must be"),
        ("UPDATE systems SET device = x'ff'", "device must be a text"),
    ],
)
def test_what_is_wrong_in_a_database_is_said_with_its_row(tmp_path, statement, said):
    path = make_database(tmp_path / "points.sqlite", model_cases((ONE,)))
    with sqlite3.connect(path) as connection:
        connection.execute(statement)
    connection.close()
    with pytest.raises(ConfigError, match=said) as raised:
        main(["--db", str(path), "--out", str(tmp_path / "model.json")])
    assert str(path) in str(raised.value)


def test_without_a_database_it_is_said_what_makes_one(tmp_path):
    with pytest.raises(ConfigError, match="profile iteration"):
        main(["--db", str(tmp_path / "none.sqlite"), "--out", str(tmp_path / "model.json")])


def test_points_are_split_by_strategy(tmp_path):
    whole = measurements((ONE, FOUR))
    enough, too_few = split_by_points(whole)
    assert enough == whole
    assert too_few == {}


def test_every_point_has_a_residual_with_its_sign():
    whole = measurements((ONE, TWO), noise=0.05)
    found = list(residuals(fit(whole), whole))
    assert len(found) == len(whole.prefills) + len(whole.decodes) + len(whole.migrations)
    for residual in found:
        assert residual.relative_error == pytest.approx(residual.predicted_s / residual.measured_s - 1.0)
        assert f"{residual.relative_error:+.1%}" in str(residual)


def test_a_report_without_held_out_points_says_none():
    whole = measurements((ONE,))
    whole = dataclasses.replace(whole, migrations=whole.migrations[:4])
    report = format_report(fit(whole), whole)
    assert re.search(r"all +migration +[\d.]+% +[\d.]+% +\d+ +none", report)
