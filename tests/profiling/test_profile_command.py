"""`loongjax profile`: its sub-commands, and what they load."""

import subprocess
import sys

import pytest

from loongjax.errors import ConfigError
from loongjax_profiling.command import main


@pytest.mark.parametrize("argv", [["--help"], ["-h"]])
def test_help_lists_what_can_be_profiled(argv, capsys):
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert "kernels" in printed
    assert "iteration" in printed


@pytest.mark.parametrize("argv", [[], ["iterations"]])
def test_an_unknown_sub_command_is_a_usage_error(argv, capsys):
    assert main(argv) == 2
    assert "usage: loongjax profile" in capsys.readouterr().err


def test_settings_that_contradict_each_other_are_refused_before_anything_is_loaded(tmp_path):
    arguments = ["iteration", str(tmp_path), "--random-weights", "tiny", "--grid", "toy", "--db", str(tmp_path / "db")]
    with pytest.raises(ConfigError, match="two models"):
        main(arguments)


@pytest.mark.parametrize(
    "call",
    [
        "from loongjax_profiling.command import main; main(['iteration', '--help'])",
        "from loongjax_profiling.fit.command import main; main(['--help'])",
        "from loongjax_profiling.plot.command import main; main(['--help'])",
    ],
)
def test_help_needs_neither_jax_nor_matplotlib(call):
    script = f"""
import atexit, sys
atexit.register(lambda: print([name for name in ("jax", "matplotlib") if name in sys.modules]))
{call}
"""
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert "usage:" in printed.stdout
    assert printed.stdout.strip().endswith("[]")
