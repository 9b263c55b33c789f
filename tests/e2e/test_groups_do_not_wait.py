"""No group waits for another: short requests come and go while a long prefill is in flight next door.

On CPU only programs of one device overlap, so every group has one device here, as the policy simple can be made to
choose, and the order of events is the proof.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from loongjax.config import EngineConfig
from loongjax.core.request import FinishReason, Request
from loongjax.core.sampling import SamplingParams
from loongjax.engine.build import build_core
from loongjax.engine.core import EngineCore

NUM_LONG = 4000
NUM_SHORT_TOKENS = 6
MAX_STEPS = 10_000


@pytest.fixture(scope="module")
def core(checkpoint: Path, cache_dir: Path) -> Iterator[EngineCore]:
    config = EngineConfig(
        checkpoint=str(checkpoint),
        num_instances=3,
        policy="simple",
        dtype="float32",
        num_slots=8192,
        max_num_seqs=1,
        max_num_batched_tokens=4096,
        prefill_tokens_per_instance=4096,
        compilation_cache_dir=str(cache_dir),
    )
    core = build_core(config)
    yield core
    core.close()


def make_request(name: str, num_prompt_tokens: int, max_tokens: int) -> Request:
    prompt = np.random.default_rng(num_prompt_tokens).integers(5, 280, num_prompt_tokens).tolist()
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return Request(request_id=name, prompt_token_ids=tuple(prompt), sampling=sampling, max_tokens=max_tokens, seed=0)


def run(core: EngineCore, name: str) -> list[tuple[str, FinishReason | None]]:
    """Request and finish reason of every event: a long prompt, then short ones as soon as the long one is in flight."""
    core.add(make_request(f"{name}-long", NUM_LONG, 1))
    events = [*core.step(0.0)]
    core.add(*(make_request(f"{name}-short-{i}", 8, NUM_SHORT_TOKENS) for i in range(4)))
    for _ in range(MAX_STEPS):
        if core.is_idle:
            break
        events += core.step(10.0)
    assert core.is_idle
    return [(event.request_id, event.finish_reason) for event in events]


def test_short_requests_are_admitted_decoded_and_ended_while_a_long_prefill_is_in_flight(core: EngineCore):
    run(core, "warm-up")  # so that nobody waits for the compiler
    events = run(core, "measured")
    assert events.index(("measured-long", FinishReason.LENGTH)) == len(events) - 1, events
    for i in range(4):
        of_request = [reason for name, reason in events if name == f"measured-short-{i}"]
        assert of_request == [None] * (NUM_SHORT_TOKENS - 1) + [FinishReason.LENGTH]
    stats = core.stats()
    assert set(stats.prefill_dop) == set(stats.decode_dop) == {1}
