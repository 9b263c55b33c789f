"""Small engines over the fake runtime, and what drives them."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterable

from loongjax.core.cluster import ClusterShape
from loongjax.core.iteration import Iteration
from loongjax.core.request import FinishReason, Request, RequestEvent
from loongjax.core.sampling import SamplingParams
from loongjax.engine.admission import admit
from loongjax.engine.client import ModelInfo
from loongjax.engine.core import EngineCore
from loongjax.runtime.protocol import RuntimeLimits
from loongjax.scheduler.policy import Policy
from loongjax.scheduler.simple import SimplePolicy
from loongjax.scheduler.simple_config import SimplePolicyConfig
from tests.engine.fake_runtime import EOS, VOCAB_SIZE, FakeRuntime, expected_tokens

MAX_STEPS = 20_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """What a test engine is made of."""

    num_instances: int = 4
    num_pages: int = 32
    page_size: int = 4
    max_model_len: int = 128
    max_num_batched_tokens: int = 64
    max_whole_prompt_len: int | None = None
    max_num_seqs: int = 8
    max_queue_len: int = 1000
    run_ahead: bool = True
    prefill_tokens_per_instance: int = 16
    iteration_timeout_s: float = 600.0
    step_s: float = 0.0
    checks: bool = True

    @property
    def shape(self) -> ClusterShape:
        return ClusterShape(num_instances=self.num_instances, num_pages=self.num_pages, page_size=self.page_size)

    @property
    def info(self) -> ModelInfo:
        return ModelInfo(
            checkpoint="fake",
            max_model_len=self.max_model_len,
            max_whole_prompt_len=self.max_whole_prompt_len,
            vocab_size=VOCAB_SIZE,
            eos_token_ids=(EOS,),
            default_sampling={},
        )

    def runtime(
        self,
        *,
        duration_s: Callable[[Iteration], float] = lambda iteration: 1.0,
        fails: Callable[[Iteration], bool] = lambda iteration: False,
    ) -> FakeRuntime:
        limits = RuntimeLimits(
            max_model_len=self.max_model_len,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_num_seqs=self.max_num_seqs,
            vocab_size=VOCAB_SIZE,
        )
        return FakeRuntime(self.shape, limits, duration_s=duration_s, fails=fails, step_s=self.step_s)

    def policy(self) -> Policy:
        return SimplePolicy(
            SimplePolicyConfig(prefill_tokens_per_instance=self.prefill_tokens_per_instance, growth_tokens=4)
        )

    def core(self, runtime: FakeRuntime | None = None, policy: Policy | None = None) -> EngineCore:
        return EngineCore(
            runtime or self.runtime(),
            policy or self.policy(),
            info=self.info,
            max_queue_len=self.max_queue_len,
            kv_bytes_per_token=100,
            run_ahead=self.run_ahead,
            iteration_timeout_s=self.iteration_timeout_s,
            checks=self.checks,
        )

    def request(self, name: str, num_prompt_tokens: int, max_tokens: int = 8, **sampling: object) -> Request:
        """A request with a random prompt that depends on its name only; ignores EOS unless told otherwise."""
        rng = random.Random(name)
        params = SamplingParams(max_tokens=max_tokens, **{"seed": rng.getrandbits(32), "ignore_eos": True} | sampling)  # pyright: ignore[reportArgumentType]
        prompt = [rng.randrange(VOCAB_SIZE) for _ in range(num_prompt_tokens)]
        (request,) = admit(prompt, params, request_id=name, info=self.info, seeds=rng)
        return request


class Journal:
    """Puts the events of requests together, and holds them to what events promise."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.last: dict[str, RequestEvent] = {}
        self.prompt_logprobs: dict[str, int] = {}

    def write(self, events: Iterable[RequestEvent]) -> None:
        for event in events:
            assert event.request_id not in self.last, "an event after the last one"
            self.tokens.setdefault(event.request_id, []).extend(event.token_ids)
            if event.prompt_logprobs is not None:
                self.prompt_logprobs[event.request_id] = self.prompt_logprobs.get(event.request_id, 0) + 1
            if event.finish_reason is not None:
                self.last[event.request_id] = event

    def check(self, request: Request) -> None:
        """The request ended, with the tokens it gives alone, or with the first of them if it was aborted."""
        last, tokens = self.last[request.request_id], tuple(self.tokens[request.request_id])
        expected = expected_tokens(request)
        if last.finish_reason in (FinishReason.ABORT, FinishReason.ERROR):
            assert tokens == expected[: len(tokens)]
            return
        assert tokens == expected
        is_stop = bool(tokens) and tokens[-1] in request.stop_token_ids
        assert last.finish_reason is (FinishReason.STOP if is_stop else FinishReason.LENGTH)
        assert last.stop_token_id == (tokens[-1] if is_stop else None)


def run(core: EngineCore, journal: Journal | None = None) -> Journal:
    """Steps until the engine is idle."""
    journal = journal or Journal()
    for _ in range(MAX_STEPS):
        if core.is_idle:
            return journal
        journal.write(core.step(1.0))
    raise AssertionError(f"not idle after {MAX_STEPS} steps: {core.stats()}")


def assert_nothing_leaks(core: EngineCore) -> None:
    core.check_integrity()
    stats = core.stats()
    assert set(stats.kv_slots_used) == {0}
    assert stats.num_requests_running == stats.num_requests_waiting == 0
