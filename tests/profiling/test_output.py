"""Files that commands are told to write: refused before the work is done."""

import errno
import os
import pathlib

import pytest

from loongjax.errors import ConfigError
from loongjax_profiling.output import prepare_file


def test_folders_are_made_and_the_file_is_not(tmp_path):
    prepare_file(tmp_path / "a" / "b" / "out.json")
    assert (tmp_path / "a" / "b").is_dir()
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_file_that_is_there_is_left_alone(tmp_path):
    (tmp_path / "out.json").write_text("before")
    prepare_file(tmp_path / "out.json")
    assert (tmp_path / "out.json").read_text() == "before"


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ConfigError, match=r"--table .* is a folder"):
        prepare_file(tmp_path, "--table")


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "plain").touch()
    with pytest.raises(ConfigError, match=r"--out .* cannot be written"):
        prepare_file(tmp_path / "plain" / "out.json")


def test_a_folder_that_takes_no_files_is_said_though_its_permissions_allow_them(tmp_path, monkeypatch):
    def refuse(self, mode):
        raise OSError(errno.ENOENT, "No such file or directory")

    monkeypatch.setattr(pathlib.Path, "open", refuse)  # as Linux does in /proc
    with pytest.raises(ConfigError, match=r"--out .*out\.json cannot be written: No such file or directory"):
        prepare_file(tmp_path / "out.json")


@pytest.mark.skipif(not pathlib.Path("/proc/self").exists(), reason="Linux has a folder that nobody can write to")
def test_proc_takes_no_files():
    with pytest.raises(ConfigError, match=r"--out /proc/x\.json cannot be written"):
        prepare_file(pathlib.Path("/proc/x.json"))


def test_what_is_not_permitted_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ConfigError, match="permission denied"):
        prepare_file(tmp_path / "out.json")
