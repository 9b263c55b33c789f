import copy
import dataclasses
import json
import os
import pathlib
from typing import Any

import numpy as np
import pytest

from loongjax.costmodel.fit import fit
from loongjax.costmodel.model import CostModel
from loongjax.costmodel.model_file import load, save
from loongjax.costmodel.work import PrefillTotals, Strategy
from loongjax.errors import ConfigError
from tests.costmodel.shapes import measurements

STRATEGIES = (Strategy(1, 2), Strategy(4, 2))


@pytest.fixture(scope="module")
def model():
    return fit(measurements(STRATEGIES, noise=0.02))


@pytest.fixture
def path(model, tmp_path):
    save(model, tmp_path / "model.json")
    return tmp_path / "model.json"


def test_what_was_saved_is_loaded(model, path):
    assert load(path) == model


def test_a_loaded_model_predicts_the_same(model, path):
    totals = PrefillTotals.of_sums([10, 5000], [100, 25e6])
    loaded = load(path)
    np.testing.assert_array_equal(loaded.prefill_s(STRATEGIES[1], totals), model.prefill_s(STRATEGIES[1], totals))
    assert loaded.source == "fitted"
    assert isinstance(loaded, CostModel)


def test_the_file_tells_where_the_times_come_from_and_how_good_they_are(path):
    raw = json.loads(path.read_text())
    assert (raw["format"], raw["version"]) == ("loongjax cost model", 3)
    assert raw["provenance"]["hardware"] == "4 x NVIDIA H200"
    assert raw["provenance"]["commit"] == "0123abc"
    assert raw["provenance"]["model"]["num_kv_heads"] == 32
    for entry in raw["strategies"]:
        for name in ("paper_prefill_errors", "refined_prefill_errors", "extend_errors", "decode_errors"):
            assert 0.0 < entry[name]["held_out"]["arithmetic_mean"] < 1.0


def test_saving_leaves_no_other_file(path):
    assert os.listdir(path.parent) == ["model.json"]


def test_a_model_without_migration_and_errors_survives(model, tmp_path):
    bare = dataclasses.replace(
        model,
        migration=None,
        migration_errors=None,
        strategies={
            strategy: dataclasses.replace(
                times,
                refined_prefill=None,
                refined_prefill_errors=None,
                paper_prefill_errors=None,
                extend_errors=None,
                decode_errors=None,
            )
            for strategy, times in model.strategies.items()
        },
    )
    save(bare, tmp_path / "bare.json")
    assert load(tmp_path / "bare.json") == bare


def test_saving_where_nothing_can_be_is_an_error(model, tmp_path):
    with pytest.raises(ConfigError, match="cannot be written"):
        save(model, tmp_path / "no folder" / "model.json")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.json cannot be read.*loongjax fit"):
        load(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ('{"format": NaN}', "NaN is not a number"),
        ("[]", 'no "format"'),
        ("3", 'no "format"'),
        ('{"format": "another"}', 'no "format"'),
        ('{"format": "loongjax cost model"}', "version is None"),
        ('{"format": "loongjax cost model", "version": 1}', "version is 1, and this program reads 3: fit again"),
        ('{"format": "loongjax cost model", "version": true}', "version is True"),
        ('{"format": "loongjax cost model", "version": 2}', "lacks.*provenance"),
        ('{"format": "loongjax cost model", "version": 3}', "lacks.*provenance"),
    ],
)
def test_a_file_that_is_no_cost_model_is_refused(text, message, tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load(path)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "bad.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(path)


BAD_VALUES = [
    (["provenance"], None, "provenance must be an object"),
    (["provenance", "hardware"], 3, r"provenance\.hardware must be of type str, got 3"),
    (["provenance", "commit"], 3, r"provenance\.commit must be of type str"),
    (["provenance", "model", "num_layers"], 0, "num_layers .* must be at least 1"),
    (["provenance", "model", "num_layers"], 1.5, r"num_layers must be of type int, got 1\.5"),
    (["provenance", "model", "num_layers"], True, "num_layers must be of type int, got True"),
    (["strategies"], {}, "strategies must be a list"),
    (["strategies", 0], "sp1", r"strategies\[0\] must be an object"),
    (["strategies", 0, "sp"], 0, "at least one instance"),
    (["strategies", 0, "sp"], "1", r"strategies\[0\]\.sp must be of type int"),
    (["strategies", 0, "decode"], None, r"strategies\[0\]\.decode must be an object"),
    (["strategies", 0, "decode", "sp"], 3, "DecodeTime is for sp3"),
    (["strategies", 0, "refined_prefill", "sp"], 3, "RefinedPrefillTime is for sp3"),
    (["strategies", 1, "decode", "per_key_s"], -1e-9, r"strategies\[1\]\.decode: per_key_s .* not negative"),
    (["strategies", 1, "decode", "per_key_s"], "fast", r"strategies\[1\]\.decode\.per_key_s must be of type float"),
    (["strategies", 1, "decode", "per_key_s"], 10**400, "per_key_s is too large for a float"),
    (["strategies", 1, "decode", "row_buckets"], 4, "row_buckets must be a list"),
    (["strategies", 1, "decode", "row_buckets"], [4, 1], "row_buckets must be at least 1 and ascending"),
    (["strategies", 1, "decode", "row_buckets"], [1, "4"], r"row_buckets\[1\] must be of type int"),
    (["strategies", 1, "paper_prefill", "constant_s"], None, "constant_s must be of type float, got None"),
    (["strategies", 1, "decode_errors", "training"], [], "training must be an object"),
    (["migration"], [], "migration must be an object"),
    (["migration", "latency_s"], -1.0, "latency_s of MigrationTime"),
]


@pytest.mark.parametrize(("where", "value", "message"), BAD_VALUES)
def test_a_bad_value_is_named_with_its_place(where, value, message, path):
    raw = json.loads(path.read_text())
    _place(raw, where[:-1])[where[-1]] = value
    path.write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=message) as refused:
        load(path)
    assert str(path) in str(refused.value)


def test_every_field_is_needed_and_no_other_is_known(path):
    raw = json.loads(path.read_text())
    for where in (
        [],
        ["provenance"],
        ["provenance", "model"],
        ["strategies", 0],
        ["strategies", 0, "paper_prefill"],
        ["strategies", 0, "decode_errors", "training"],
        ["migration"],
    ):
        for name in _place(raw, where):
            if name in ("format", "version"):
                continue
            changed = copy.deepcopy(raw)
            del _place(changed, where)[name]
            path.write_text(json.dumps(changed))
            with pytest.raises(ConfigError, match=rf"lacks \['{name}'\]"):
                load(path)
        changed = copy.deepcopy(raw)
        _place(changed, where)["surprise"] = 1
        path.write_text(json.dumps(changed))
        with pytest.raises(ConfigError, match=r"\['surprise'\] that is not known"):
            load(path)


def as_version_2(raw: dict[str, Any], per_extend_key_s: float | None) -> dict[str, Any]:
    """The same file as it was written before keys of all requests had a coefficient."""
    raw = copy.deepcopy(raw) | {"version": 2}
    for entry in raw["strategies"]:
        entry["per_extend_key_s"] = per_extend_key_s
        del entry["refined_prefill"]["extend_constant_s"], entry["refined_prefill"]["per_past_key_s"]
    return raw


@pytest.mark.parametrize("per_extend_key_s", [None, 4e-8])
def test_a_key_of_a_decode_in_a_file_of_version_2_is_any_past_key(per_extend_key_s, model, path):
    raw = as_version_2(json.loads(path.read_text()), per_extend_key_s)
    path.write_text(json.dumps(raw))
    for strategy, times in load(path).strategies.items():
        before = model.times(strategy)
        key_s = before.decode.per_key_s if per_extend_key_s is None else per_extend_key_s
        form = dataclasses.replace(before.refined_prefill, extend_constant_s=0.0, per_past_key_s=key_s)
        assert times == dataclasses.replace(before, refined_prefill=form)


def test_a_file_of_version_2_is_read_with_as_much_suspicion(path):
    current = json.loads(path.read_text())
    for where, value, message in (
        (["per_extend_key_s"], -1e-9, "per_past_key_s of RefinedPrefillTime .* not negative"),
        (["decode"], None, r"strategies\[0\]\.decode must be an object"),
        (["refined_prefill"], 3, r"strategies\[0\]\.refined_prefill must be an object"),
        (["surprise"], 1, r"\['surprise'\] that is not known"),
    ):
        raw = as_version_2(current, None)
        _place(raw["strategies"][0], where[:-1])[where[-1]] = value
        path.write_text(json.dumps(raw))
        with pytest.raises(ConfigError, match=message):
            load(path)


def test_a_model_that_was_measured_before_predicts_for_prompts_what_its_file_says():
    path = pathlib.Path(__file__).with_name("cost_model_version_2.json")
    model, raw = load(path), json.loads(path.read_text())
    assert raw["version"] == 2
    assert len(model.strategies) == len(raw["strategies"]) > 1
    for entry in raw["strategies"]:
        strategy, form = Strategy(entry["sp"], entry["tp"]), entry["refined_prefill"]
        # Beyond the largest bucket nothing is padded.
        padded, squared = 100_000, (100_000 * strategy.sp) ** 2
        prompt_s = (
            form["constant_s"] + form["per_padded_token_s"] * padded + form["per_squared_token_s"] * float(squared)
        )
        assert model.prefill_s(strategy, PrefillTotals.of_batch(padded * strategy.sp, squared)) == prompt_s
        extend = PrefillTotals.of_sums(padded * strategy.sp, squared, new_times_past=10**9, past_keys=10**6)
        past_s = form["per_new_times_past_s"] * 10**9 + entry["decode"]["per_key_s"] * 10**6 / strategy.sp
        assert model.prefill_s(strategy, extend).item() == pytest.approx(prompt_s + past_s)


def test_a_strategy_that_comes_twice_is_refused(path):
    raw = json.loads(path.read_text())
    raw["strategies"].append(raw["strategies"][0])
    path.write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=r"strategies\[2\] is sp1 tp2, which is there already"):
        load(path)


def test_a_number_written_as_an_integer_is_a_float(path):
    raw = json.loads(path.read_text())
    raw["migration"]["latency_s"] = 0
    path.write_text(json.dumps(raw))
    migration = load(path).migration
    assert migration is not None
    assert isinstance(migration.latency_s, float)


def _place(raw: Any, where: list[Any]) -> Any:
    for step in where:
        raw = raw[step]
    return raw
