"""Without a named checkpoint the model that ships is served, or its absence is told."""

import importlib.resources
from pathlib import Path

import pytest

from loongjax.errors import ConfigError
from loongjax.models.shipped import resolve_checkpoint


def test_a_named_checkpoint_is_taken_as_it_is():
    assert resolve_checkpoint("some/folder") == Path("some/folder")


def test_a_missing_model_of_our_own_is_told_with_what_would_work(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.resources, "files", lambda package: tmp_path)
    with pytest.raises(ConfigError, match="give the folder of a Llama checkpoint"):
        resolve_checkpoint(None)


def test_the_model_that_ships_is_found_in_the_package(monkeypatch, tmp_path):
    folder = tmp_path / "checkpoints" / "needle"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    monkeypatch.setattr(importlib.resources, "files", lambda package: tmp_path)
    assert resolve_checkpoint(None) == folder
