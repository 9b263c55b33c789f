"""Wherever shapes are written down, tests check them at run time."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = {"loongjax": ROOT, "loongjax_server": ROOT / "server", "loongjax_profiling": ROOT / "profiling"}


def checked_modules() -> list[str]:
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["addopts"]
    [listed] = [option for option in options if option.startswith("--jaxtyping-packages=")]
    *names, _ = listed.partition("=")[2].split(",")
    return names


def test_every_module_with_shapes_is_checked():
    with_shapes = [
        path.relative_to(folder).with_suffix("").as_posix().replace("/", ".")
        for package, folder in SOURCES.items()
        for path in (folder / package).rglob("*.py")
        if "from jaxtyping import" in path.read_text()
    ]
    assert len(with_shapes) > 50
    names = checked_modules()
    unchecked = [module for module in with_shapes if not any(f"{module}.".startswith(f"{name}.") for name in names)]
    assert unchecked == [], "pyproject.toml lists what is checked"


def test_whatever_is_listed_exists():
    for name in checked_modules():
        path = SOURCES[name.partition(".")[0]] / name.replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").is_file(), name
