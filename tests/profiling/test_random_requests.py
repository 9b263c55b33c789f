"""Random requests are what was asked for, and the same again from the same generator."""

from __future__ import annotations

import numpy as np

from loongjax.core.request import ServiceLevel
from loongjax_profiling.random_requests import random_request


def test_a_request_has_the_lengths_that_were_asked_for() -> None:
    slo = ServiceLevel(ttft_s=2.0)
    request = random_request(
        np.random.default_rng(3), "r", prompt_len=1000, output_len=7, vocab_size=50, arrival_s=1.5, slo=slo
    )
    assert (request.request_id, len(request.prompt_token_ids), request.max_tokens) == ("r", 1000, 7)
    assert set(request.prompt_token_ids) == set(range(50)), "a thousand draws of fifty"
    assert (request.arrival_s, request.slo) == (1.5, slo)
    assert request.sampling.ignore_eos, "no token ends it sooner"
    assert request.sampling.temperature == 0.0


def test_prompts_follow_from_the_generator() -> None:
    def prompts(seed: int) -> list[tuple[int, ...]]:
        random = np.random.default_rng(seed)
        return [
            random_request(random, f"{index}", prompt_len=5, output_len=1, vocab_size=1 << 20).prompt_token_ids
            for index in range(3)
        ]

    assert prompts(1) == prompts(1) != prompts(2)
    assert len({*prompts(1)}) == 3
