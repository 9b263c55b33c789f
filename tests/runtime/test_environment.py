"""What XLA is told before it starts."""

import pytest

from loongjax.config import EngineConfig
from loongjax.runtime.environment import device_environment


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    for name in ("NPROC", "JAX_NUM_CPU_DEVICES", "XLA_PYTHON_CLIENT_MEM_FRACTION", "NCCL_NVLS_ENABLE"):
        monkeypatch.delenv(name, raising=False)


def test_a_bare_environment_gets_what_the_settings_say():
    environment = device_environment(EngineConfig(num_cpu_devices=3, memory_fraction=0.5))
    assert environment["JAX_NUM_CPU_DEVICES"] == "3"
    assert environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5"
    assert int(environment["NPROC"]) >= 16
    assert environment["NCCL_NVLS_ENABLE"] == "0"


def test_what_an_operator_has_set_stays(monkeypatch):
    monkeypatch.setenv("NPROC", "64")
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "5")
    environment = device_environment(EngineConfig())
    assert environment["NPROC"] == "64"
    assert environment["JAX_NUM_CPU_DEVICES"] == "5"


def test_an_explicit_setting_beats_the_environment(monkeypatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "5")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.1")
    environment = device_environment(EngineConfig(num_cpu_devices=2, memory_fraction=0.7))
    assert environment["JAX_NUM_CPU_DEVICES"] == "2"
    assert environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.7"
