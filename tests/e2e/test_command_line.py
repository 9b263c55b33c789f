"""The `loongjax` command: helpful at once, and one line for everything that cannot work."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from loongjax.config import EngineConfig
from loongjax_server.config import ServerConfig
from tests.checkpoints import make_checkpoint
from tests.e2e.serve_process import LOONGJAX, user_environment

TIMEOUT_S = 120.0


def loongjax(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [LOONGJAX, *arguments], capture_output=True, text=True, timeout=TIMEOUT_S, env=user_environment()
    )


def test_help_lists_the_commands():
    result = loongjax("--help")
    assert result.returncode == 0
    assert "serve" in result.stdout
    assert "convert" in result.stdout


def test_help_of_serve_explains_every_setting():
    result = loongjax("serve", "--help")
    assert result.returncode == 0
    for field in (*dataclasses.fields(EngineConfig), *dataclasses.fields(ServerConfig)):
        if field.name != "checkpoint":
            assert "--" + field.name.replace("_", "-") in result.stdout, field.name


@pytest.mark.parametrize("arguments", [["--help"], ["serve", "--help"]])
def test_help_loads_neither_jax_nor_transformers(arguments: list[str]):
    script = (
        "import sys; from loongjax.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "sys.exit(bool({'jax', 'flax', 'transformers'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, capture_output=True, timeout=TIMEOUT_S)


def test_the_public_names_load_on_first_use():
    script = "import sys, loongjax; assert 'jax' not in sys.modules; from loongjax import LLM, SamplingParams"
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, timeout=TIMEOUT_S)


@pytest.mark.parametrize(
    "arguments", [["serve", "--no-such-flag"], ["serve", "--tp", "two"], ["serve", "--dtype", "int8"], ["brew"]]
)
def test_a_wrong_command_line_is_a_usage_error(arguments: list[str]):
    result = loongjax(*arguments)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert arguments[-1].lstrip("-") in result.stderr


def bin_only(folder: Path) -> Path:
    checkpoint = make_checkpoint(folder)
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    return checkpoint


def with_rope(folder: Path) -> Path:
    return make_checkpoint(folder, overrides={"rope_parameters": {"rope_type": "spiral", "rope_theta": 10000.0}})


def with_architecture(folder: Path) -> Path:
    checkpoint = make_checkpoint(folder)
    config = json.loads((checkpoint / "config.json").read_text())
    config |= {"architectures": ["MambaForCausalLM"], "model_type": "mamba"}
    (checkpoint / "config.json").write_text(json.dumps(config))
    return checkpoint


CHUNKED_IN_SMALL_POOLS = ["--policy", "chunked", "--num-instances", "2", "--num-slots", "64"]


@pytest.mark.parametrize(
    ("make", "flags", "found", "works"),
    [
        (lambda folder: folder / "nowhere", [], "nowhere", "folder"),
        (bin_only, [], ".bin", "save_pretrained"),
        (with_rope, [], "spiral", "llama3"),
        (with_architecture, [], "Mamba", "Llama"),
        (make_checkpoint, ["--tp", "3"], "tp", "1, 2"),
        (make_checkpoint, ["--page-size", "12"], "12", "8 and 16"),
        (make_checkpoint, ["--num-instances", "9"], "9", "8"),
        (make_checkpoint, [*CHUNKED_IN_SMALL_POOLS, "--max-model-len", "100"], "100", "--max-model-len to 65"),
    ],
    ids=["missing folder", ".bin only", "rope", "architecture", "tp", "page size", "devices", "after loading"],
)
def test_what_cannot_be_served_is_refused_in_one_line(
    make: Callable[[Path], Path], flags: list[str], found: str, works: str, tmp_path: Path
):
    result = loongjax("serve", make(tmp_path / "checkpoint"), "--port", "0", "--log-level", "warning", *flags)
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    # Libraries may have warned before; the last line is ours, and the only one.
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("loongjax serve: ")
    assert result.stderr.count("loongjax serve: ") == 1
    assert found in line
    assert works in line
