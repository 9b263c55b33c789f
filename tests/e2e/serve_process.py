"""`loongjax serve` as its users run it: a process of its own, on virtual CPU devices, on a free port."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

LOONGJAX = Path(sys.executable).with_name("loongjax")
START_TIMEOUT_S = 180.0
ANSWER_TIMEOUT_S = 180.0
"""A request may have to wait for several executables to be built."""
EXIT_TIMEOUT_S = 60.0


def user_environment(*, quick_compiler: bool = False) -> dict[str, str]:
    """What a user's shell has: nothing of what the tests prepare for their own JAX.

    Args:
        quick_compiler: but XLA's flags, by which it compiles in a third of the time, and what the tests compiled.
    """
    prepared = {"NPROC", "JAX_NUM_CPU_DEVICES", "LOONGJAX_API_KEY"} | (set() if quick_compiler else {"XLA_FLAGS"})
    inherited = {name: value for name, value in os.environ.items() if name not in prepared}
    return inherited | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}


def flags(settings: Mapping[str, Any]) -> list[str]:
    """Command-line flags that say the same as keyword arguments."""
    return [part for name, value in settings.items() for part in ("--" + name.replace("_", "-"), str(value))]


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Returns as soon as the condition holds; fails when time is over."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.02)


class ServeProcess:
    """A running server. It is ready when the constructor returns."""

    def __init__(
        self, checkpoint: Path | None, log_path: Path, *, quick_compiler: bool = True, **settings: Any
    ) -> None:
        self._log_path = log_path
        with log_path.open("wb") as log:
            self._popen = subprocess.Popen(
                [LOONGJAX, "serve", *([checkpoint] if checkpoint else []), "--port", "0", *flags(settings)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=user_environment(quick_compiler=quick_compiler),
            )
        try:
            wait_until(lambda: self._announced_port() is not None or self.has_ended, START_TIMEOUT_S, "start")
            port = self._announced_port()
            assert port is not None, self.log
        except BaseException:
            self.kill()
            raise
        self.port = port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return self._log_path.read_text()

    @property
    def has_ended(self) -> bool:
        return self._popen.poll() is not None

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_TIMEOUT_S)

    def request(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers with names in lower case, and body."""
        connection = self.connect()
        try:
            data = None if body is None else json.dumps(body)
            connection.request(method, path, data, {"Content-Type": "application/json", **(headers or {})})
            response = connection.getresponse()
            return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
        finally:
            connection.close()

    def metrics(self) -> Metrics:
        status, _, page = self.request("GET", "/metrics")
        assert status == 200
        return Metrics(page.decode())

    def terminate(self) -> None:
        """Sends SIGTERM, and does not wait."""
        self._popen.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """The exit status, once it has ended."""
        return self._popen.wait(EXIT_TIMEOUT_S)

    def kill(self) -> None:
        """Ends it at once, if it has not ended. Its engine follows by itself."""
        if not self.has_ended:
            self._popen.kill()
        self._popen.wait(EXIT_TIMEOUT_S)

    def kill_engine(self) -> None:
        """Ends the engine's process as the kernel does when memory runs out."""
        (engine,) = [
            pid
            for pid, parent in _parents().items()
            if parent == self._popen.pid and b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        os.kill(engine, signal.SIGKILL)

    def _announced_port(self) -> int | None:
        match = re.search(r"ready: http://127\.0\.0\.1:(\d+)", self.log)
        return int(match[1]) if match else None


class Metrics:
    """One reading of /metrics."""

    def __init__(self, page: str) -> None:
        self._samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]

    def value(self, name: str) -> float:
        """The only sample of that name."""
        (value,) = [sample.value for sample in self._samples if sample.name == name]
        return value

    def by_instance(self, name: str) -> list[float]:
        return [sample.value for sample in self._samples if sample.name == name]

    def iterations(self, phase: str, *, min_dop: int = 1) -> float:
        """Prefill or decode iterations of at least that degree of parallelism."""
        name = f"loongjax_{phase}_dop"
        at_most = {
            float(sample.labels["le"]): sample.value for sample in self._samples if sample.name == f"{name}_bucket"
        }
        return self.value(f"{name}_count") - at_most.get(float(min_dop - 1), 0.0)


def _parents() -> dict[int, int]:
    """Parent of every process."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    return parents
