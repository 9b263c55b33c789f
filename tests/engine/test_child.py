"""How an engine's process is made ready before its loop begins."""

from __future__ import annotations

import gc
import sys

import pytest

import loongjax.engine.build
from loongjax.config import EngineConfig
from loongjax.engine.child import CoreFactory


def test_what_lives_when_the_engine_is_built_is_never_looked_at_by_the_garbage_collector_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built = object()
    monkeypatch.setattr(loongjax.engine.build, "build_core", lambda _: built)
    switch_interval_s = sys.getswitchinterval()
    try:
        assert CoreFactory(EngineConfig())() is built
        assert gc.get_freeze_count() > 10_000
        assert len(gc.get_objects()) < gc.get_freeze_count()
    finally:
        gc.unfreeze()
        sys.setswitchinterval(switch_interval_s)
