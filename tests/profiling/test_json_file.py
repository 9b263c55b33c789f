"""JSON that every reader takes."""

import json
import pathlib

from loongjax_profiling.json_file import write_json


def test_numbers_that_are_not_finite_are_null_however_deep_they_are(tmp_path: pathlib.Path):
    value = {"a": [1.5, float("inf"), {"b": (float("nan"), -float("inf"), 2)}], "c": None, "d": "inf", "e": True}
    write_json(value, tmp_path / "file.json")
    text = (tmp_path / "file.json").read_text()
    assert json.loads(text) == {"a": [1.5, None, {"b": [None, None, 2]}], "c": None, "d": "inf", "e": True}
    assert text.endswith("}\n")


def test_what_json_does_not_know_is_written_as_its_text(tmp_path: pathlib.Path):
    write_json({"path": pathlib.PurePosixPath("a/b")}, tmp_path / "file.json")
    assert json.loads((tmp_path / "file.json").read_text()) == {"path": "a/b"}
