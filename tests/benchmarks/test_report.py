"""What benchmarks keep can be read again, and says where it comes from."""

from __future__ import annotations

import argparse
import json
import pathlib

import jax
import pytest

from benchmarks import report


def test_rows_are_kept_with_their_origin(tmp_path: pathlib.Path) -> None:
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    path = tmp_path / "new folder" / "rows.json"
    arguments = parser.parse_args(["--out", str(path), "--commit", "abc"])
    rows = [{"us": 1.5, "work": "a, b"}, {"error": 'of "c"'}]
    about = report.origin("some_kernel", ["--out", "rows.json"], arguments.commit)
    report.write(arguments.out, about | {"shape": "tiny"}, rows)
    assert json.loads(path.read_text()) == {
        "command": "python -m benchmarks.some_kernel --out rows.json",
        "hardware": f"{jax.device_count()} x cpu",
        "jax": jax.__version__,
        "commit": "abc",
        "shape": "tiny",
        "rows": rows,
    }
    assert '  {"us": 1.5, "work": "a, b"},' in path.read_text().splitlines(), "a row a line"


@pytest.mark.parametrize(("num_devices", "named"), [(None, jax.device_count()), (1, 1)])
def test_hardware_is_what_was_used(tmp_path: pathlib.Path, num_devices: int | None, named: int) -> None:
    report.write(tmp_path / "rows.json", {}, [], num_devices=num_devices)
    assert json.loads((tmp_path / "rows.json").read_text())["hardware"] == f"{named} x cpu"


def test_without_a_path_nothing_is_kept() -> None:
    report.write(argparse.Namespace(out=None).out, {}, [])


def test_without_arguments_the_command_is_the_process_own(monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["benchmarks/some_kernel.py", "--repeats", "2"])
    assert report.origin("some_kernel", None, "abc")["command"] == "python -m benchmarks.some_kernel --repeats 2"
