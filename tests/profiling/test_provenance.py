"""The commit of the code, wherever a command runs."""

import subprocess
from pathlib import Path

import pytest

from loongjax_profiling.provenance import checked_out_commit


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A file in a repository that has a commit."""
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "-q")
    (folder / "code.py").write_text("pass\n")
    git(folder, "add", "code.py")
    git(folder, "commit", "-q", "-m", "Code")
    return folder / "code.py"


def test_it_is_that_of_the_code_and_not_of_where_the_command_runs(code: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert checked_out_commit(code) == git(code.parent, "rev-parse", "HEAD")


def test_changes_are_marked(code: Path):
    code.write_text("raise\n")
    assert checked_out_commit(code) == git(code.parent, "rev-parse", "HEAD") + "-dirty"


def test_code_that_only_lies_in_a_repository_of_others_has_no_commit(code: Path):
    installed = code.parent / "installed.py"
    installed.touch()
    assert checked_out_commit(installed) is None


def test_outside_of_repositories_and_without_git_there_is_none(code: Path, tmp_path: Path, monkeypatch):
    (tmp_path / "alone.py").touch()
    assert checked_out_commit(tmp_path / "alone.py") is None
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert checked_out_commit(code) is None
