"""One compilation cache for all runtimes of these tests: most of their programs are the same."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("xla")
