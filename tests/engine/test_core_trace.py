"""Random lives of an engine: arrivals, aborts, failures and completions in any order, on pools that are too small."""

from __future__ import annotations

import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from loongjax.core.iteration import Iteration
from loongjax.core.request import FinishReason, Request
from loongjax.engine.core import EngineCore
from tests.engine.cluster import Cluster, Journal, assert_nothing_leaks
from tests.engine.fake_runtime import FakeRuntime


class EngineTrace(RuleBasedStateMachine):
    """Whatever happens, every accepted request ends once, with the tokens that it would have alone."""

    @initialize(
        num_instances=st.integers(1, 5),
        num_pages=st.integers(3, 12),
        page_size=st.sampled_from([1, 2, 4]),
        max_num_seqs=st.integers(1, 4),
        run_ahead=st.booleans(),
        seed=st.integers(0, 1000),
    )
    def build(
        self, num_instances: int, num_pages: int, page_size: int, max_num_seqs: int, run_ahead: bool, seed: int
    ) -> None:
        num_slots = num_instances * num_pages * page_size
        self.cluster = Cluster(
            num_instances=num_instances,
            num_pages=num_pages,
            page_size=page_size,
            max_model_len=num_slots + 1,
            max_num_batched_tokens=num_pages * page_size + 1,
            max_num_seqs=max_num_seqs,
            run_ahead=run_ahead,
            prefill_tokens_per_instance=max(4, num_pages * page_size // 2),
        )
        rng = random.Random(seed)
        self.must_fail = False
        self.runtime: FakeRuntime = self.cluster.runtime(
            duration_s=lambda iteration: rng.choice([0.5, 1.0, 7.0]), fails=self._fails
        )
        self.core: EngineCore = self.cluster.core(self.runtime)
        self.journal = Journal()
        self.requests: dict[str, Request] = {}
        self.aborted: set[str] = set()

    def _fails(self, iteration: Iteration) -> bool:
        fails, self.must_fail = self.must_fail, False
        return fails

    @rule(length=st.floats(0, 1), share=st.floats(0, 1), echo=st.booleans(), stops=st.booleans())
    def arrive(self, length: float, share: float, echo: bool, stops: bool) -> None:
        if self.core.death is not None:
            return
        room = self.cluster.max_model_len
        num_prompt_tokens = 1 + round(length * (room - 1))
        request = self.cluster.request(
            f"r{len(self.requests)}",
            num_prompt_tokens,
            round(share * (room - num_prompt_tokens)),
            prompt_logprobs=0 if echo else None,
            ignore_eos=not stops,
        )
        self.requests[request.request_id] = request
        self.core.add(request)

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        live = sorted(self.requests.keys() - self.journal.last.keys())
        if live and self.core.death is None:
            name = data.draw(st.sampled_from(live))
            self.aborted.add(name)
            self.core.abort(name)

    @rule()
    def fail_next(self) -> None:
        self.must_fail = True

    @rule(num_steps=st.integers(1, 6), waits=st.booleans())
    def step(self, num_steps: int, waits: bool) -> None:
        for _ in range(num_steps):
            if self.core.death is None and not self.core.is_idle:
                self.journal.write(self.core.step(1.0 if waits else 0.0))

    @invariant()
    def is_sound(self) -> None:
        if hasattr(self, "core"):
            self.core.check_integrity()

    def teardown(self) -> None:
        if not hasattr(self, "core"):
            return
        self.must_fail = False
        # It may still die here, of a failure that was injected before.
        while self.core.death is None and not self.core.is_idle:
            self.journal.write(self.core.step(1.0))
        assert self.journal.last.keys() == self.requests.keys()
        for name, request in self.requests.items():
            self.journal.check(request)
            reason = self.journal.last[name].finish_reason
            assert reason is not FinishReason.ABORT or name in self.aborted
            if request.sampling.prompt_logprobs is not None and reason in (FinishReason.STOP, FinishReason.LENGTH):
                assert self.journal.prompt_logprobs[name] == 1
        assert_nothing_leaks(self.core)


TestEngineTrace = EngineTrace.TestCase
TestEngineTrace.settings = settings(max_examples=20, stateful_step_count=20, deadline=None)
