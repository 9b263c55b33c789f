"""One checkpoint, one set of shapes and one server for all tests: on CPU, compiling is what costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.checkpoints import make_checkpoint
from tests.e2e.golden_answers import GoldenAnswer, load_golden
from tests.e2e.serve_process import ANSWER_TIMEOUT_S, ServeProcess

ENGINE_SETTINGS: dict[str, Any] = {
    "tp": 2,
    "num_instances": 3,
    "dtype": "float32",
    "num_slots": 96,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "prefill_tokens_per_instance": 32,
}
"""Few shapes and few sets of instances to compile for, and a pool so small that 100 tokens need two instances.

All engines of these tests have these, so that they share executables.
"""


@pytest.fixture(scope="session")
def golden() -> list[GoldenAnswer]:
    return load_golden("gqa")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny-llama", "gqa")


@pytest.fixture(scope="session")
def engine_settings(cache_dir: Path) -> dict[str, Any]:
    return ENGINE_SETTINGS | {"compilation_cache_dir": str(cache_dir)}


@pytest.fixture(scope="session")
def server(
    checkpoint: Path, engine_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServeProcess]:
    """The server that all tests share which do not end it."""
    process = ServeProcess(checkpoint, tmp_path_factory.mktemp("server") / "log", **engine_settings)
    yield process
    process.kill()


@pytest.fixture
def serve(checkpoint: Path, engine_settings: dict[str, Any], tmp_path: Path) -> Iterator[Callable[..., ServeProcess]]:
    """Starts servers of a test's own."""
    processes: list[ServeProcess] = []

    def start(**settings: Any) -> ServeProcess:
        log_path = tmp_path / f"log{len(processes)}"
        processes.append(ServeProcess(checkpoint, log_path, **engine_settings | settings))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()


@pytest.fixture
def client(server: ServeProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=ANSWER_TIMEOUT_S) as client:
        yield client
