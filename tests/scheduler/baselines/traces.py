"""Random clusters, requests, completion orders and aborts for policies on fixed groups."""

from __future__ import annotations

import dataclasses
import random

from hypothesis import strategies as st

from loongjax.config import PolicyName, SchedulingConfig
from loongjax.core.cluster import ClusterShape
from loongjax.scheduler.build import build_policy, max_request_tokens
from tests.scheduler.toy_engine import Job, ToyEngine

BASELINES: tuple[PolicyName, ...] = ("static", "replicated", "prefill-first", "chunked", "disaggregated")


@dataclasses.dataclass(frozen=True)
class Setup:
    """A policy and its cluster."""

    name: PolicyName
    shape: ClusterShape
    max_num_batched_tokens: int
    max_num_seqs: int

    def engine(self) -> ToyEngine:
        config = SchedulingConfig(policy=self.name)
        policy = build_policy(config, shape=self.shape, max_num_seqs=self.max_num_seqs)
        return ToyEngine(
            policy,
            self.shape,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_num_seqs=self.max_num_seqs,
        )

    @property
    def max_request_tokens(self) -> int:
        return max_request_tokens(SchedulingConfig(policy=self.name), self.shape, self.max_num_batched_tokens)

    def draw_lengths(self, rng: random.Random) -> tuple[int, int]:
        """A prompt and an output limit that together are no longer than the policy promises to carry."""
        longest = self.max_request_tokens
        total = longest if rng.random() < 0.2 else rng.randint(2, longest)
        prompt = rng.randint(1, total - 1)
        return (prompt, 0) if rng.random() < 0.1 else (prompt, total - prompt)

    def add(self, engine: ToyEngine, rng: random.Random) -> Job:
        return engine.add(*self.draw_lengths(rng))


@st.composite
def setups(draw: st.DrawFn, name: PolicyName) -> Setup:
    """Pools from one longest request of the policy upwards."""
    page_size = draw(st.sampled_from([1, 4, 16]))
    least, most = {"prefill-first": (1, 1), "disaggregated": (2, 5)}.get(name, (1, 5))
    shape = ClusterShape(
        num_instances=draw(st.integers(least, most)),
        num_pages=draw(st.integers(2 if page_size == 1 else 1, {1: 24, 4: 6, 16: 3}[page_size])),
        page_size=page_size,
    )
    return Setup(
        name=name,
        shape=shape,
        max_num_batched_tokens=shape.num_slots * draw(st.integers(1, 2)),
        max_num_seqs=draw(st.sampled_from([1, 2, 16])),
    )
