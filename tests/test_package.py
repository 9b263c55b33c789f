"""What is packed is what runs: the wheel holds all three packages, and the model that ships."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel puts into site-packages."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("loongjax", "server", "profiling"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(source / "dist")]
    subprocess.run(build, cwd=source, check=True, capture_output=True, timeout=120)
    [wheel] = (source / "dist").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_wheel_holds_the_three_packages_and_nothing_else(installed):
    names = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert names == {"loongjax", "loongjax_server", "loongjax_profiling"}


def test_the_model_that_ships_is_found_from_the_wheel(installed):
    program = "from loongjax.models.shipped import resolve_checkpoint as find; print(find(None))"
    environment = os.environ | {"PYTHONPATH": str(installed), "JAX_PLATFORMS": "cpu"}
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=installed, env=environment, check=True, capture_output=True, timeout=120
    )
    folder = Path(found.stdout.decode().strip())
    assert folder == installed / "loongjax" / "checkpoints" / "needle"
    in_tree = ROOT / "loongjax" / "checkpoints" / "needle"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in in_tree.iterdir()
    }


def test_public_names_load_on_first_use():
    program = (
        "import sys, loongjax; print('jax' in sys.modules, *(getattr(loongjax, n).__name__ for n in loongjax.__all__))"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["False", "LLM", "SamplingParams", "ServiceLevel"]


def test_the_commands_are_those_of_the_project(installed):
    [entry_points] = installed.glob("*.dist-info/entry_points.txt")
    lines = entry_points.read_text().splitlines()
    assert "loongjax = loongjax.cli:main" in lines
    assert "serve = loongjax_server.command:main" in lines
    assert "convert = loongjax.commands.convert:main" in lines
    assert "profile = loongjax_profiling.command:main" in lines
    assert "fit = loongjax_profiling.fit.command:main" in lines
    assert "plot = loongjax_profiling.plot.command:main" in lines
