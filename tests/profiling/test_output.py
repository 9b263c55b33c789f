"""Files that commands are told to write: refused before the work is done."""

import errno
import os
import pathlib
import sqlite3

import pytest

from loongjax.errors import ConfigError
from loongjax_profiling.output import prepare_file, prepare_folder


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


def test_what_the_command_reads_is_not_written_over_under_any_name(tmp_path):
    read, other = tmp_path / "model.json", tmp_path / "other.json"
    read.write_text("times")
    for same in (read, tmp_path / "folder" / ".." / "model.json", tmp_path / "link.json"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        (tmp_path / "link.json").unlink(missing_ok=True)
        (tmp_path / "link.json").symlink_to(read)
        with pytest.raises(ConfigError, match=r"--table .* is the file of --cost-model"):
            prepare_file(same, "--table", inputs={"--trace": None, "--cost-model": str(read)})
    prepare_file(other, inputs={"--cost-model": read})
    prepare_file(read, inputs={"--cost-model": other})
    assert read.read_text() == "times"


def test_a_database_is_not_written_over(tmp_path):
    with sqlite3.connect(tmp_path / "points.sqlite") as connection:
        connection.execute("CREATE TABLE points (x)")
    connection.close()
    with pytest.raises(ConfigError, match=r"--out .*points\.sqlite is an SQLite database"):
        prepare_file(tmp_path / "points.sqlite")


def test_each_file_of_a_folder_is_looked_at(tmp_path):
    names = ("a.json", "b.json")
    prepare_folder(tmp_path / "x" / "out", names)
    assert list((tmp_path / "x" / "out").iterdir()) == []
    (tmp_path / "x" / "out" / "b.json").write_text("times")
    prepare_folder(tmp_path / "x" / "out", names)
    with pytest.raises(ConfigError, match=r"--out .*b\.json is the file of --trace"):
        prepare_folder(tmp_path / "x" / "out", names, inputs={"--trace": tmp_path / "x" / "out" / "b.json"})
