"""How an engine's process is made ready before its loop begins."""

from __future__ import annotations

import gc
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import loongjax.engine.build
from loongjax.config import EngineConfig
from loongjax.engine.child import CoreFactory
from loongjax.engine.thread_switches import SWITCH_INTERVAL_S
from loongjax.models.orbax_checkpoint import convert
from tests.checkpoints import make_checkpoint


def test_what_lives_when_the_engine_is_built_is_never_looked_at_by_the_garbage_collector_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built = object()
    monkeypatch.setattr(loongjax.engine.build, "build_core", lambda _: built)
    switch_interval_s = sys.getswitchinterval()
    try:
        assert CoreFactory(EngineConfig())() is built
        assert sys.getswitchinterval() == pytest.approx(SWITCH_INTERVAL_S)
        assert gc.get_freeze_count() > 10_000
        assert len(gc.get_objects()) < gc.get_freeze_count()
    finally:
        gc.unfreeze()
        sys.setswitchinterval(switch_interval_s)


def test_a_converted_checkpoint_is_loaded_without_a_line_of_others(tmp_path: Path) -> None:
    convert(make_checkpoint(tmp_path / "original", "gqa"), tmp_path / "converted")
    config = EngineConfig(checkpoint=str(tmp_path / "converted"), num_instances=1, num_slots=64)
    program = "import sys, pickle; pickle.loads(bytes.fromhex(sys.argv[1]))().close()"
    factory = pickle.dumps(CoreFactory(config)).hex()
    done = subprocess.run(
        [sys.executable, "-c", program, factory], capture_output=True, text=True, check=True, timeout=300
    )
    lines = done.stderr.splitlines()
    assert any("INFO loongjax" in line for line in lines)
    assert [line for line in lines if "INFO" in line and "INFO loongjax" not in line] == []
