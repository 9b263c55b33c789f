"""Groups do not wait for each other: decodes go on at their pace while a long prefill runs next door."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loongjax.config import EngineConfig
from loongjax.core.cluster import Group
from loongjax.core.iteration import Completion, PrefillInput, PrefillIteration
from loongjax.core.plan import TokenInterval
from loongjax.core.sampling import SamplingParams
from loongjax.models.checkpoint import random_weights
from loongjax.models.config import ModelConfig
from loongjax.parallel.mesh import DeviceGrid
from loongjax.runtime.build import assemble_runtime
from loongjax.runtime.local import LocalRuntime
from loongjax.runtime.model_spec import ModelSpec
from tests.runtime.driver import Driver

pytestmark = [pytest.mark.gpu, pytest.mark.alone]

NUM_PREFILL_TOKENS = 65_536
LEAST_SHARE = 0.8
SHAPE = ModelConfig(
    hidden_size=2048,
    num_layers=4,
    num_q_heads=16,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=5632,
    vocab_size=32000,
    max_position_embeddings=131_072,
    dtype="bfloat16",
)


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[LocalRuntime]:
    if len(jax.devices()) < 2:
        pytest.skip("needs 2 GPUs")
    config = EngineConfig(
        num_instances=2,
        num_slots=NUM_PREFILL_TOKENS + 1024,
        max_num_batched_tokens=NUM_PREFILL_TOKENS,
        max_num_seqs=8,
        warm_up=False,
        compilation_cache_dir=str(tmp_path),
    )
    grid = DeviceGrid(jax.devices(), num_instances=2)
    shards = random_weights(SHAPE, dtype=jnp.bfloat16, devices=grid.instances, seed=0)
    runtime = assemble_runtime(config, ModelSpec(SHAPE, "bfloat16", 1), grid, shards)
    yield runtime
    runtime.close()


class PatientDriver(Driver):
    """A driver that lets iterations of others end in between."""

    def __init__(self, runtime: LocalRuntime) -> None:
        super().__init__(runtime)
        self.ended: set[int] = set()

    def wait_for(self, iteration_id: int) -> Completion:
        while True:
            for completion in self.take(self.runtime.completions(None)):
                if completion.iteration_id == iteration_id:
                    return completion

    def take(self, completions: list[Completion]) -> list[Completion]:
        self.ended.update(completion.iteration_id for completion in completions)
        return completions


def count_steps(driver: PatientDriver, is_over: Callable[[], bool]) -> int:
    """Decode steps of instance 1, one after another, until something else is over."""
    steps = 0
    while not is_over():
        driver.decode((1,), {1: ["mate"]})
        steps += 1
    return steps


def prefill_long(driver: PatientDriver, name: str) -> int:
    """Submits the long prefill on instance 0 and returns its iteration id, without waiting."""
    sampling = SamplingParams(temperature=0.0, max_tokens=None)
    driver.add(name, np.random.default_rng(1).integers(0, SHAPE.vocab_size, NUM_PREFILL_TOKENS).tolist(), sampling)
    request = driver.requests[name]
    kept = driver.kv.keep(name, (TokenInterval(0, 0, NUM_PREFILL_TOKENS),))
    item = PrefillInput(request, np.array(request.prompt_token_ids, np.int32), kept, False)
    iteration = PrefillIteration(10_000 + len(driver.requests), Group((0,)), (item,))
    driver.runtime.submit(iteration)
    return iteration.iteration_id


def test_a_long_prefill_leaves_other_groups_at_least_four_fifths_of_their_steps(runtime: LocalRuntime, record_property):
    driver = PatientDriver(runtime)
    driver.add("mate", list(range(1, 1000)), SamplingParams(temperature=0.0, max_tokens=None))
    driver.prefill((1,), {"mate": [(1, 0, -1)]})
    driver.decode((1,), {1: ["mate"]}, steps=3)
    warm_up = prefill_long(driver, "warm-up")
    while warm_up not in driver.ended:
        driver.take(runtime.completions(None))
    driver.kv.release("warm-up")

    started = time.monotonic()
    iteration_id = prefill_long(driver, "long")
    disturbed = count_steps(driver, lambda: iteration_id in driver.ended)
    duration_s = time.monotonic() - started

    deadline = time.monotonic() + duration_s
    undisturbed = count_steps(driver, lambda: time.monotonic() > deadline)
    record_property("steps", {"disturbed": disturbed, "undisturbed": undisturbed, "duration_s": duration_s})
    print(f"{disturbed} steps beside a prefill of {duration_s:.2f} s, {undisturbed} alone")
    assert disturbed >= LEAST_SHARE * undisturbed
