"""Converted checkpoints give every device the bits that the original gives it."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from loongjax.errors import CheckpointError, ConfigError
from loongjax.models.checkpoint import load_weights
from loongjax.models.config import ModelConfig
from loongjax.models.generation import GenerationConfig
from loongjax.models.orbax_checkpoint import convert, is_converted
from loongjax.models.tokenizer import load_tokenizer
from tests.checkpoints import make_checkpoint


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("original"), "odd_vocab", dtype="bfloat16", num_files=2)


@pytest.fixture(scope="module")
def converted(original, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "new"
    convert(original, folder)
    return folder


@pytest.mark.parametrize(("num_instances", "tp", "dtype"), [(1, 1, "bfloat16"), (2, 4, "bfloat16"), (3, 2, "float32")])
def test_every_device_gets_the_bits_that_the_original_gives_it(original, converted, num_instances, tp, dtype):
    config = ModelConfig.from_checkpoint(original)
    devices = [jax.devices()[i * tp : (i + 1) * tp] for i in range(num_instances)]
    expected = load_weights(original, config, dtype=dtype, devices=devices)
    found = load_weights(converted, config, dtype=dtype, devices=devices)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.devices()) == (b.dtype, b.devices())
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_everything_but_the_weights_is_taken_along(original, converted):
    assert is_converted(converted)
    assert not is_converted(original)
    assert ModelConfig.from_checkpoint(converted) == ModelConfig.from_checkpoint(original)
    assert GenerationConfig.from_checkpoint(converted) == GenerationConfig.from_checkpoint(original)
    text = "hello the world"
    assert load_tokenizer(converted).encode(text) == load_tokenizer(original).encode(text)
    assert not list(converted.glob("*.safetensors*"))


def test_a_folder_that_holds_something_is_not_written_to(original, tmp_path):
    (tmp_path / "keep").touch()
    with pytest.raises(ConfigError, match="no empty folder"):
        convert(original, tmp_path)


def test_a_folder_that_cannot_be_written_to_is_refused_before_any_work(original, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(ocp, "save", lambda *_: pytest.fail("the work has begun"))
    for target in (tmp_path / "file" / "new", Path("/proc/new")):
        with pytest.raises(ConfigError, match=f"{target} cannot be written to .*: give a folder"):
            convert(original, target)


def test_a_converted_checkpoint_is_not_converted_again(converted, tmp_path):
    with pytest.raises(CheckpointError, match="already"):
        convert(converted, tmp_path / "again")


def test_a_broken_original_is_refused_before_anything_is_written(tmp_path):
    path = make_checkpoint(tmp_path / "original", "gqa") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="cut short"):
        convert(tmp_path / "original", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_config_that_the_weights_do_not_fit_is_refused_with_the_tensor(converted, tmp_path):
    config = ModelConfig.from_checkpoint(make_checkpoint(tmp_path, "gqa"))
    with pytest.raises(CheckpointError, match=r"has shape \[321, 64\].* must have \[320, 64\]"):
        load_weights(converted, config, dtype="float32", devices=[jax.devices()[:1]])


def test_weights_that_were_lost_are_refused(converted, tmp_path):
    shutil.copytree(converted, tmp_path / "copy")
    for path in (tmp_path / "copy" / "weights").rglob("*"):
        if path.is_file() and path.parent.name in ("d", "state"):
            path.unlink()
    config = ModelConfig.from_checkpoint(converted)
    with pytest.raises(CheckpointError, match=r"weights (cannot be read|does not hold)"):
        load_weights(tmp_path / "copy", config, dtype="float32", devices=[jax.devices()[:1]])
