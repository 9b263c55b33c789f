"""Signals and mistakes before the server serves: one line, the right status, and no process left behind."""

from __future__ import annotations

import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest
from server_client import wait_until

from loongjax.config import EngineConfig
from loongjax.errors import ConfigError
from loongjax_server import launch
from loongjax_server.config import API_KEY_VARIABLE, ServerConfig

SCRIPT = pathlib.Path(__file__).parent / "loading_process.py"


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_the_model_loads_ends_both_processes_without_a_traceback(signum, status):
    with subprocess.Popen([sys.executable, str(SCRIPT)], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        match = next(found for line in process.stderr if (found := re.search(r"loading in (\d+)", line)))
        loader_pid = int(match[1])
        try:
            process.send_signal(signum)
            _, log = process.communicate(timeout=20)
            wait_until(lambda: not is_running(loader_pid))
        finally:
            process.kill()
            if is_running(loader_pid):
                os.kill(loader_pid, signal.SIGKILL)
    assert process.returncode == status, log
    assert "Traceback" not in log
    assert len(log.splitlines()) == 1


@pytest.fixture
def no_tokenizer(monkeypatch):
    monkeypatch.setattr(launch, "load_tokenizer", lambda folder: pytest.fail("something was loaded"))
    monkeypatch.setattr(launch.signal, "signal", lambda signum, handler: None)


@pytest.mark.usefixtures("no_tokenizer")
def test_an_unreadable_chat_template_is_told_before_anything_is_loaded(tmp_path):
    with pytest.raises(ConfigError, match="--chat-template"):
        launch.launch(EngineConfig(), ServerConfig(port=0, chat_template=tmp_path / "missing"))


@pytest.mark.usefixtures("no_tokenizer")
def test_an_empty_key_variable_is_told_before_anything_is_loaded(monkeypatch):
    monkeypatch.setenv(API_KEY_VARIABLE, "")
    with pytest.raises(ConfigError, match=API_KEY_VARIABLE):
        launch.launch(EngineConfig(), ServerConfig(port=0))


def test_settings_are_explained_without_loading_what_serves():
    script = (
        "import sys; from loongjax.cli import main\n"
        "try: main(['serve', '--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(bool({'fastapi', 'uvicorn', 'numpy'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, timeout=60)
