"""The `loongjax` command: finds sub-commands, explains what is wrong, and never shows a user a traceback of theirs."""

import importlib.metadata
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import loongjax
from loongjax.cli import COMMANDS_GROUP, main
from loongjax.errors import ConfigError
from tests.checkpoints import make_checkpoint


class Point:
    """An entry point that a test makes up."""

    def __init__(self, name: str, load) -> None:
        self.name = name
        self.load = load


@pytest.fixture
def commands(monkeypatch):
    points: list[Point] = []

    def entry_points(*, group: str):
        assert group == COMMANDS_GROUP
        return points

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    return points


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"]])
def test_help_lists_every_command(argv, capsys):
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert "serve" in printed
    assert "convert" in printed


def test_help_says_a_word_on_each_of_the_projects_commands(capsys):
    assert main(["--help"]) == 0
    _, _, listed = capsys.readouterr().out.partition("commands:\n")
    summaries = dict(line.split(maxsplit=1) for line in listed.splitlines())
    pyproject = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    assert summaries.keys() == pyproject["project"]["entry-points"][COMMANDS_GROUP].keys()


def test_a_command_of_others_is_listed_without_one(commands, capsys):
    commands += [Point("serve", None), Point("paint", None)]
    assert main(["--help"]) == 0
    assert capsys.readouterr().out.endswith(
        "  paint\n  serve      serve a checkpoint over an OpenAI-compatible HTTP API\n"
    )


@pytest.mark.parametrize("arguments", [["--help"], ["convert", "--help"], ["simulate", "--help"]])
@pytest.mark.parametrize("buffering", [{}, {"PYTHONUNBUFFERED": "1"}], ids=["buffered", "unbuffered"])
def test_a_reader_that_leaves_is_no_error(arguments, buffering):
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "loongjax", *arguments],
            stdout=write_end,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            env=os.environ | buffering,
        )
    finally:
        os.close(write_end)
    assert (done.returncode, done.stderr) == (141, "")


def test_another_broken_pipe_is_an_error_like_any_other(commands):
    def fail(argv):
        raise BrokenPipeError

    commands.append(Point("serve", lambda: fail))
    with pytest.raises(BrokenPipeError):
        main(["serve"])


def test_the_package_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "loongjax", "--version"], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == loongjax.__version__ == importlib.metadata.version("loongjax")


def test_version_is_the_distributions(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == importlib.metadata.version("loongjax")


def test_an_unknown_command_is_a_usage_error(capsys):
    assert main(["sevre"]) == 2
    printed = capsys.readouterr()
    assert "no command 'sevre'" in printed.err
    assert "serve" in printed.err


def test_only_the_command_asked_for_is_loaded_and_gets_the_rest(commands):
    seen = []
    commands += [Point("run", lambda: seen.append), Point("other", lambda: pytest.fail("loaded"))]
    assert main(["run", "--flag", "1"]) == 0
    assert seen == [["--flag", "1"]]


def test_a_missing_extra_is_named(commands, capsys):
    def load():
        raise ModuleNotFoundError("No module named 'fastapi'", name="fastapi")

    commands.append(Point("serve", load))
    assert main(["serve"]) == 1
    assert "'fastapi'" in capsys.readouterr().err


def test_an_error_of_the_users_is_one_line(commands, capsys):
    def fail(argv):
        raise ConfigError("tp=3 does not divide")

    commands.append(Point("serve", lambda: fail))
    assert main(["serve"]) == 1
    assert capsys.readouterr().err == "loongjax serve: tp=3 does not divide\n"


def test_an_interrupt_is_one_line_and_status_130(commands, capsys):
    def interrupt(argv):
        raise KeyboardInterrupt

    commands.append(Point("serve", lambda: interrupt))
    assert main(["serve"]) == 130
    assert capsys.readouterr().err == "loongjax serve: interrupted\n"


def test_a_missing_extra_that_only_the_command_itself_imports_is_named(commands, capsys):
    def run(argv):
        raise ModuleNotFoundError("No module named 'uvicorn'", name="uvicorn")

    commands.append(Point("serve", lambda: run))
    assert main(["serve"]) == 1
    assert "'uvicorn'" in capsys.readouterr().err


def test_help_loads_neither_jax_nor_transformers():
    script = "import sys; from loongjax.cli import main; main(['--help']); print([m for m in sys.modules if m in "
    script += "('jax', 'transformers', 'fastapi', 'tyro')])"
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert printed.stdout.strip().endswith("[]")


def test_convert_writes_a_checkpoint_and_refuses_a_full_folder(tmp_path: Path, capsys):
    source = make_checkpoint(tmp_path / "source", "gqa")
    target = tmp_path / "target"
    assert main(["convert", str(source), str(target)]) == 0
    assert str(target) in capsys.readouterr().out
    assert json.loads((target / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert main(["convert", str(source), str(target)]) == 1
    assert "no empty folder" in capsys.readouterr().err
