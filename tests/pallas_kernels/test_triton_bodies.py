"""The Triton kernels' bodies, interpreted on the CPU: in a process of its own, since Triton reads the setting once."""

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "interpreted"


def test_interpreted_bodies_agree_with_float64():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", str(FOLDER)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert finished.returncode == 0, finished.stdout[-4000:]
    assert " passed" in finished.stdout
    assert "skipped" not in finished.stdout
