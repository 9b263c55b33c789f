"""Requests of random prompts, whose outputs are as long as asked for, whatever the model says."""

from __future__ import annotations

import numpy as np

from loongjax.core.request import NO_SLO, Request, ServiceLevel
from loongjax.core.sampling import SamplingParams

_SAMPLING = SamplingParams(temperature=0.0, ignore_eos=True)


def random_request(
    random: np.random.Generator,
    request_id: str,
    *,
    prompt_len: int,
    output_len: int,
    vocab_size: int,
    arrival_s: float = 0.0,
    slo: ServiceLevel = NO_SLO,
) -> Request:
    """A greedy request of random token ids, which ends after `output_len` tokens and not before."""
    return Request(
        request_id=request_id,
        prompt_token_ids=tuple(random.integers(0, vocab_size, prompt_len).tolist()),
        sampling=_SAMPLING,
        max_tokens=output_len,
        seed=0,
        arrival_s=arrival_s,
        slo=slo,
    )
