"""From a database to measurements: the right system, work and padding."""

import dataclasses

import pytest

from loongjax.costmodel.measurement import Padding
from loongjax.costmodel.work import DecodeWork, PrefillWork, Strategy
from loongjax.errors import ConfigError
from loongjax_profiling.iteration.case import Case
from loongjax_profiling.iteration.database import Database, Point
from loongjax_profiling.iteration.meter import Timing
from loongjax_profiling.iteration.selection import choose_system, measurements_of
from tests.costmodel.shapes import LLAMA2_7B
from tests.profiling.synthetic import H200, RUN, make_database, timed

PREFILL = Case(kind="prefill", strategy=Strategy(2), batch_size=3, input_len=100)
DECODE = Case(kind="decode", strategy=Strategy(2), batch_size=5, input_len=40, num_masters=2)
MIGRATION = Case(kind="migration", strategy=Strategy(2, 2), input_len=50)
A100 = dataclasses.replace(H200, device="NVIDIA A100-SXM4-80GB")
LARGER = dataclasses.replace(H200, model=dataclasses.replace(LLAMA2_7B, num_layers=40))


def measured(path, system=H200):
    with Database(path) as database:
        return measurements_of(database, system)


def test_points_become_works_with_their_times(tmp_path):
    timing = Timing(seconds=0.25, stddev_s=None, num_rounds=16, keys=(130, 120))
    path = make_database(
        tmp_path / "points.sqlite",
        [PREFILL, DECODE, MIGRATION],
        time=lambda case: timing if case == DECODE else timed(case),
    )
    measurements = measured(path)
    [prefill], [decode], [migration] = measurements.prefills, measurements.decodes, measurements.migrations
    assert prefill.work == PrefillWork(new_lens=(100, 100, 100))
    assert prefill.measured_s == timed(PREFILL).seconds
    assert decode.work == DecodeWork(rows=(3, 2), keys=(130, 120))
    assert decode.measured_s == 0.25
    assert (migration.tp, migration.num_tokens, migration.measured_s) == (2, 50, timed(MIGRATION).seconds)
    assert prefill.padding == decode.padding == RUN.padding
    assert measurements.provenance.model == LLAMA2_7B


def test_an_extend_is_chunks_and_decodes_behind_other_tokens(tmp_path):
    case = Case(kind="extend", strategy=Strategy(1), batch_size=2, input_len=30, past_len=500, num_decodes=3)
    [point] = measured(make_database(tmp_path / "points.sqlite", [case])).prefills
    assert point.work == PrefillWork(new_lens=(30, 30, 1, 1, 1), past_lens=(500,) * 5)
    assert point.measured_s == timed(case).seconds


def test_failed_points_and_prefills_that_scale_down_are_left_out(tmp_path):
    path = make_database(tmp_path / "points.sqlite", [dataclasses.replace(PREFILL, scales_down=True)])
    with Database(path) as database:
        database.add(database.begin_run(H200, RUN), Point(case=DECODE, error="no memory"))
    measurements = measured(path)
    assert measurements.prefills == measurements.decodes == ()


def test_provenance_names_the_largest_machine_and_all_commits(tmp_path):
    path = tmp_path / "points.sqlite"
    for case, num_devices, commit in ((PREFILL, 1, "aaa"), (DECODE, 4, None), (MIGRATION, 2, "bbb")):
        make_database(path, [case], run=dataclasses.replace(RUN, num_devices=num_devices, commit=commit))
    provenance = measured(path).provenance
    assert provenance.hardware == "4 x NVIDIA H200"
    assert provenance.commit == "aaa, bbb"


def test_a_point_is_padded_as_its_own_run_did(tmp_path):
    path = tmp_path / "points.sqlite"
    early, late = Padding(token_buckets=(64, 100)), Padding(token_buckets=(64, 128, 256), row_buckets=(1, 4))
    for case, padding in ((PREFILL, early), (DECODE, late)):
        make_database(path, [case], run=dataclasses.replace(RUN, padding=padding))
    [prefill], [decode] = measured(path).prefills, measured(path).decodes
    assert (prefill.padding, decode.padding) == (early, late)
    make_database(path, [PREFILL], run=dataclasses.replace(RUN, padding=late))
    [prefill] = measured(path).prefills
    assert prefill.padding == late, "measured again"


@pytest.mark.parametrize(
    ("device", "model", "expected"), [("h200", None, None), ("A100", None, A100), ("H200", "Larger", LARGER)]
)
def test_a_system_is_chosen_by_parts_of_its_names(tmp_path, device, model, expected):
    path = make_database(tmp_path / "points.sqlite", [PREFILL])
    make_database(path, [PREFILL], system=A100)
    make_database(path, [PREFILL], system=LARGER, run=dataclasses.replace(RUN, model_name="the larger one"))
    with Database(path) as database:
        if expected is None:
            with pytest.raises(ConfigError, match="several systems"):
                choose_system(database, device=device, model=model)
        else:
            assert choose_system(database, device=device, model=model) == expected


@pytest.mark.parametrize(("words", "dtype_bytes"), [("32-bit", 4), ("LLAMA2 16-bit", 2)])
def test_models_of_one_name_are_told_apart_by_their_shapes(tmp_path, words, dtype_bytes):
    path = make_database(tmp_path / "points.sqlite", [PREFILL])
    float32 = dataclasses.replace(H200, model=dataclasses.replace(LLAMA2_7B, dtype_bytes=4))
    make_database(path, [PREFILL], system=float32)
    with Database(path) as database:
        assert choose_system(database, model=words).model.dtype_bytes == dtype_bytes
        with pytest.raises(ConfigError, match=r"32/32 heads, 16-bit; .*32/32 heads, 32-bit"):
            choose_system(database)


def test_the_only_system_needs_no_names(tmp_path):
    with Database(make_database(tmp_path / "points.sqlite", [PREFILL])) as database:
        assert choose_system(database) == H200


def test_a_system_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    path = make_database(tmp_path / "points.sqlite", [PREFILL])
    with Database(path) as database, pytest.raises(ConfigError, match=r"no such system.*NVIDIA H200 with llama2-7b"):
        choose_system(database, device="B200")


def test_an_empty_database_says_what_fills_it(tmp_path):
    path = make_database(tmp_path / "points.sqlite", [])
    with Database(path) as database, pytest.raises(ConfigError, match="profile iteration` measures some"):
        choose_system(database)
