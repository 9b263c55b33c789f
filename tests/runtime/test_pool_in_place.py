"""The KV pool is most of a device's memory: no program may hold a second one, not even for a moment."""

import pytest

from loongjax.core.sampling import SamplingParams
from loongjax.runtime import local
from tests.checkpoints import make_checkpoint
from tests.runtime.driver import Driver, small_runtime

NUM_SLOTS = 1 << 16


@pytest.fixture
def temporary_bytes(monkeypatch) -> dict[str, int]:
    """By program and rows of one rank: how much memory its executables take beside their arguments and results."""
    found: dict[str, int] = {}

    def watch(name: str, program) -> None:
        def call(*arguments):
            if (key := f"{name} of {arguments[4].shape[1]} rows" if name == "decode" else name) not in found:
                found[key] = program.lower(*arguments).compile().memory_analysis().temp_size_in_bytes
            return program(*arguments)

        monkeypatch.setattr(local, f"{name}_step", call)

    for name in ("prefill", "decode", "extend", "migrate"):
        watch(name, getattr(local, f"{name}_step"))
    return found


@pytest.mark.parametrize("instances", [(0,), (0, 1)])
def test_no_program_makes_a_second_pool(tmp_path, temporary_bytes, instances):
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "gqa", with_tokenizer=False)
    limits = {"num_slots": NUM_SLOTS, "max_num_seqs": 4, "max_num_batched_tokens": 64}
    runtime = small_runtime(checkpoint, tmp_path / "cache", num_instances=2, **limits)
    driver = Driver(runtime)
    for name in "ab":
        driver.add(name, range(2, 9), SamplingParams(temperature=0.0, max_tokens=None))
        driver.prefill(instances, {name: [(0, 0, -1)]})
    driver.decode(instances, {0: ["a"]}, steps=1)
    driver.decode(instances, {0: ["a", "b"]}, steps=1)
    programs = {"prefill", "decode of 1 rows", "decode of 4 rows"}
    if len(instances) == 1:
        driver.extend(0, {"a": 1, "b": 1})
        programs.add("extend")
    if len(instances) > 1:
        driver.migrate("a", 0, 1, 4)
        programs.add("migrate")
    pool_bytes = runtime.num_kv_bytes_per_token * NUM_SLOTS
    assert set(temporary_bytes) == programs
    assert max(temporary_bytes.values()) < pool_bytes / 4, temporary_bytes
    runtime.close()
