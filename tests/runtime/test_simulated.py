"""The runtime without devices: whatever it says, it says on time."""

import dataclasses

import numpy as np
import pytest

from loongjax.core.cluster import ClusterShape, Group
from loongjax.core.iteration import (
    Completion,
    DecodeInput,
    DecodeIteration,
    DecodeSubBatch,
    ExtendInput,
    ExtendIteration,
    InstanceTable,
    MigrateIteration,
    PrefillInput,
    PrefillIteration,
    RecoverIteration,
)
from loongjax.core.request import Request
from loongjax.core.sampling import SamplingParams
from loongjax.costmodel.model import CostModel, Source
from loongjax.costmodel.work import DecodeTotals, PrefillTotals, Strategy
from loongjax.runtime.protocol import JumpingRuntime, Runtime, RuntimeLimits
from loongjax.runtime.simulated import SimulatedRuntime, Span

SHAPE = ClusterShape(num_instances=4, num_pages=64, page_size=4, tp=2)
LIMITS = RuntimeLimits(max_model_len=256, max_num_batched_tokens=64, max_num_seqs=8, vocab_size=2)


@dataclasses.dataclass(frozen=True)
class TransparentModel(CostModel):
    """Times that show what they were made of, in seconds: a prefill takes tokens / instances, and more for new x past
    tokens / 1000 and for past keys / 10; a step 1 + keys / 1000.
    """

    @property
    def source(self) -> Source:
        return "fitted"

    def prefill_s[Real: (float, np.ndarray)](self, strategy: Strategy, totals: PrefillTotals[Real]) -> Real:
        assert strategy.tp == SHAPE.tp
        return totals.num_tokens / strategy.sp + totals.new_times_past / 1000.0 + totals.past_keys / 10.0

    def decode_s[Real: (float, np.ndarray)](self, strategy: Strategy, totals: DecodeTotals[Real]) -> Real:
        return 1.0 + totals.busiest_keys / 1000.0 + 0.0 * totals.num_rows

    def migration_s(self, num_tokens: int | float, tp: int) -> float:
        return float(num_tokens * tp)


def request(name: str, prompt_len: int) -> Request:
    return Request(
        request_id=name, prompt_token_ids=(0,) * prompt_len, sampling=SamplingParams(), max_tokens=100, seed=0
    )


def prefill(iteration_id: int, group: tuple[int, ...], *lens: int) -> PrefillIteration:
    inputs = [
        PrefillInput(request(f"{iteration_id}/{index}", length), np.zeros(length, np.int32), (), False)
        for index, length in enumerate(lens)
    ]
    return PrefillIteration(iteration_id, Group(group), tuple(inputs))


def decode(iteration_id: int, group: tuple[int, ...], masters: dict[int, tuple[int, ...]]) -> DecodeIteration:
    """Masters and the keys that each of their requests has there."""
    batches = [
        DecodeSubBatch(
            master,
            tuple(
                DecodeInput(
                    request(f"{iteration_id}/{master}/{index}", held),
                    (),
                    held,
                    0,
                    (InstanceTable(master, np.zeros(-(-held // SHAPE.page_size), np.int32), held),),
                )
                for index, held in enumerate(keys)
            ),
        )
        for master, keys in masters.items()
    ]
    return DecodeIteration(iteration_id, Group(group), tuple(batches), False)


def simulated(**options: object) -> SimulatedRuntime:
    return SimulatedRuntime(SHAPE, LIMITS, TransparentModel(), **options)  # pyright: ignore[reportArgumentType]


def next_completion(runtime: SimulatedRuntime) -> tuple[float, Completion]:
    (completion,) = runtime.completions(None)
    return runtime.now_s(), completion


def test_it_is_a_runtime_that_jumps():
    assert isinstance(simulated(), Runtime)
    assert isinstance(simulated(), JumpingRuntime)


def test_a_prefill_takes_what_the_cost_model_says_of_its_group():
    runtime = simulated()
    runtime.submit(prefill(0, (1, 2), 10, 6))
    now_s, completion = next_completion(runtime)
    assert now_s == completion.elapsed_s == 8.0
    assert [token.request_id for token in completion.tokens] == ["0/0", "0/1"]


def test_an_extend_takes_what_its_new_tokens_do_behind_their_past_keys():
    spans: list[Span] = []
    runtime = simulated(on_span=spans.append)
    inputs = tuple(
        ExtendInput(
            request(name, 100),
            np.zeros(num_new, np.int32),
            num_past,
            np.arange(num_new, dtype=np.int32),
            InstanceTable(1, np.zeros(25, np.int32), num_past + num_new),
            (),
            is_sampled,
        )
        for name, num_new, num_past, is_sampled in (("a", 1, 100, True), ("b", 20, 50, False), ("c", 4, 0, True))
    )
    runtime.submit(ExtendIteration(0, Group((1,)), inputs))
    now_s, completion = next_completion(runtime)
    assert now_s == pytest.approx(25.0 + (100 + 20 * 50) / 1000.0 + (100 + 50) / 10.0)
    assert [token.request_id for token in completion.tokens] == ["a", "c"]
    assert [(span.kind, span.num_requests, span.num_steps) for span in spans] == [("extend", 3, 1)]


def test_a_decode_step_counts_the_keys_of_its_fullest_instance():
    runtime = simulated()
    runtime.submit(decode(0, (0, 1, 2), {0: (30, 20), 2: (40,)}))
    assert next_completion(runtime)[0] == pytest.approx(1.05)


def test_a_migration_takes_what_its_tokens_take_and_a_recovery_nothing():
    runtime = simulated()
    slots = np.arange(7, dtype=np.int32)
    runtime.submit(MigrateIteration(0, 3, 1, slots, slots))
    assert next_completion(runtime)[0] == 14.0
    runtime.submit(RecoverIteration(1, Group((0,))))
    assert next_completion(runtime)[0] == 14.0


def test_disjoint_groups_overlap_and_end_in_the_order_of_their_ends():
    runtime = simulated()
    runtime.submit(prefill(0, (0, 1), 20))
    runtime.submit(prefill(1, (2,), 4))
    assert [next_completion(runtime) for _ in range(2)] == [
        (4.0, Completion(1, runtime_tokens(1), 4.0)),
        (10.0, Completion(0, runtime_tokens(0), 10.0)),
    ]


def runtime_tokens(iteration_id: int):
    runtime = simulated()
    runtime.submit(prefill(iteration_id, (0,), 1))
    return runtime.completions(None)[0].tokens


def test_iterations_that_share_an_instance_run_one_after_the_other():
    runtime = simulated()
    runtime.submit(prefill(0, (0, 1), 8))
    runtime.submit(prefill(1, (1, 2), 4))
    assert next_completion(runtime)[0] == 4.0
    now_s, completion = next_completion(runtime)
    assert now_s == completion.elapsed_s == 6.0


def test_what_ends_at_one_moment_completes_in_one_call():
    runtime = simulated()
    runtime.submit(prefill(0, (0,), 3))
    runtime.submit(prefill(1, (1,), 3))
    assert [completion.iteration_id for completion in runtime.completions(None)] == [0, 1]


def test_the_clock_stands_still_unless_it_is_told_to_wait():
    runtime = simulated(start_s=5.0)
    runtime.submit(prefill(0, (0,), 3))
    assert runtime.completions(0.0) == []
    assert runtime.now_s() == 5.0
    assert runtime.completions(2.0) == []
    assert runtime.now_s() == 7.0
    assert len(runtime.completions(2.0)) == 1
    assert runtime.now_s() == 8.0


def test_the_clock_may_be_moved_as_far_as_nothing_happens():
    runtime = simulated()
    runtime.submit(prefill(0, (0,), 3))
    runtime.advance_to(3.0)
    with pytest.raises(AssertionError):
        runtime.advance_to(3.5)
    with pytest.raises(AssertionError):
        runtime.advance_to(2.0)


def test_without_anything_in_flight_nothing_ever_happens():
    runtime = simulated()
    assert runtime.next_event_s == float("inf")
    assert runtime.completions(None) == []


def test_a_span_tells_what_a_group_did_from_when_to_when():
    spans: list[Span] = []
    runtime = simulated(on_span=spans.append)
    runtime.submit(prefill(0, (0,), 3))
    runtime.submit(decode(1, (0, 1), {0: (10, 10)}))
    while runtime.completions(None):
        pass
    assert spans == [
        Span(kind="prefill", group=Group((0,)), begin_s=0.0, end_s=3.0, num_requests=1, num_steps=1),
        Span(kind="decode", group=Group((0, 1)), begin_s=3.0, end_s=4.02, num_requests=2, num_steps=1),
    ]


class TestJumps:
    """A decode of a request of 10 keys on instance 0 and two of 10 on instance 1: steps take 1.02, 1.022, 1.024, ..."""

    def start(self, num_steps: int) -> SimulatedRuntime:
        runtime = simulated()
        runtime.submit(decode(7, (0, 1), {0: (10,), 1: (10, 10)}))
        runtime.prolong(7, num_steps)
        return runtime

    @staticmethod
    def end_of_step(count: int) -> float:
        """Adding one step after the other, as decodes of one step do."""
        now_s = 0.0
        for step in range(count):
            now_s += 1.0 + (20.0 + 2.0 * step) / 1000.0
        return now_s

    def test_it_ends_exactly_when_as_many_single_steps_would(self):
        now_s, completion = next_completion(self.start(100))
        assert now_s == self.end_of_step(100)
        assert completion.num_steps == 100
        assert completion.is_over
        assert np.cumsum(completion.steps_s)[-1] == pytest.approx(now_s)
        assert len(completion.tokens) == 3

    def test_in_the_middle_it_tells_of_the_steps_that_are_over(self):
        runtime = self.start(100)
        runtime.advance_to(self.end_of_step(3) + 0.5)
        (completion,) = runtime.catch_up(stop=False)
        assert (completion.num_steps, completion.is_over) == (3, False)
        assert completion.elapsed_s == self.end_of_step(3)
        assert runtime.catch_up(stop=False) == []
        now_s, completion = next_completion(runtime)
        assert (now_s, completion.num_steps, completion.is_over) == (self.end_of_step(100), 97, True)

    def test_stopped_it_ends_with_the_step_that_it_is_in(self):
        runtime = self.start(100)
        runtime.advance_to(self.end_of_step(3) + 0.5)
        (completion,) = runtime.catch_up(stop=True)
        assert completion.num_steps == 3
        now_s, completion = next_completion(runtime)
        assert (now_s, completion.num_steps, completion.is_over) == (self.end_of_step(4), 1, True)
        assert runtime.next_event_s == float("inf")

    def test_stopped_in_its_first_step_it_has_nothing_to_tell(self):
        runtime = self.start(100)
        runtime.advance_to(0.5)
        assert runtime.catch_up(stop=True) == []
        assert next_completion(runtime)[0] == self.end_of_step(1)

    def test_between_two_steps_it_is_over(self):
        runtime = self.start(100)
        runtime.advance_to(self.end_of_step(5))
        (completion,) = runtime.catch_up(stop=False)
        assert (completion.num_steps, completion.is_over) == (5, True)
        assert runtime.next_event_s == float("inf")

    def test_one_that_was_stopped_may_jump_again(self):
        runtime = self.start(100)
        runtime.advance_to(self.end_of_step(3) + 0.5)
        runtime.catch_up(stop=True)
        runtime.prolong(7, 10)
        now_s, completion = next_completion(runtime)
        assert (now_s, completion.num_steps) == (self.end_of_step(13), 10)

    def test_what_shares_an_instance_waits_for_its_end_even_if_that_comes_earlier(self):
        runtime = self.start(100)
        runtime.advance_to(0.5)
        runtime.catch_up(stop=True)
        runtime.submit(prefill(8, (1,), 1))
        runtime.completions(None)
        assert next_completion(runtime)[0] == self.end_of_step(1) + 1.0
