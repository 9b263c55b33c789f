"""Settings that cannot work are refused with what was found, what was expected and how to mend it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import tyro

from loongjax.config import EngineConfig
from loongjax.errors import ConfigError


def test_the_defaults_work() -> None:
    config = EngineConfig()
    assert (config.checkpoint, config.tp, config.num_instances, config.dtype) == (None, 1, None, "auto")


@pytest.mark.parametrize("page_size", [1, 2, 16, 64, 128])
def test_pages_of_any_power_of_two_work(page_size: int) -> None:
    assert EngineConfig(page_size=page_size, num_slots=1280 * page_size).page_size == page_size


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tp": 0}, "--tp must be at least 1, got 0"),
        ({"num_instances": -1}, "--num-instances must be at least 1, got -1"),
        ({"max_queue_len": 0}, "--max-queue-len must be at least 1"),
        ({"page_size": 24}, "--page-size must be a power of two, got 24: 16 and 32 are the nearest"),
        ({"max_requests_per_master": 0}, "--max-requests-per-master must be at least 1, got 0"),
        ({"num_slots": 100}, r"--num-slots must be a multiple of --page-size \(16\), got 100: try 96"),
        ({"num_slots": 5}, "try 16"),
        ({"memory_fraction": 1.5}, "--memory-fraction must be above 0 and at most 1, got 1.5"),
        ({"iteration_timeout_s": 0.0}, "--iteration-timeout-s must be above 0, got 0.0"),
        ({"iteration_timeout_s": float("nan")}, "--iteration-timeout-s must be above 0, got nan"),
        ({"checkpoint": "no/such/folder"}, "the checkpoint must be a folder, got 'no/such/folder'"),
    ],
)
def test_what_cannot_work_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**fields)


def test_it_is_a_command_line(tmp_path: Path) -> None:
    config = tyro.cli(EngineConfig, args=[str(tmp_path), "--tp", "2", "--num-slots", "320", "--dtype", "float32"])
    assert config == EngineConfig(checkpoint=str(tmp_path), tp=2, num_slots=320, dtype="float32")
    assert tyro.cli(EngineConfig, args=[]) == EngineConfig()


def test_a_type_that_does_not_exist_is_refused() -> None:
    config = EngineConfig()
    object.__setattr__(config, "dtype", "int8")
    with pytest.raises(ConfigError, match="--dtype must be auto, bfloat16, float16 or float32, got 'int8'"):
        config.__post_init__()


def test_every_field_is_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tyro.cli(EngineConfig, args=["--help"])
    help_text = capsys.readouterr().out
    for field in dataclasses.fields(EngineConfig):
        assert field.name == "checkpoint" or f"--{field.name.replace('_', '-')}" in help_text
