"""Step 3 of the paper for a choice: equation 5, asked in terms of places in the window and of instances."""

from __future__ import annotations

from loongjax.core.cluster import InstanceId
from loongjax.scheduler.draft import Draft
from loongjax.scheduler.esp.batching import Question, SplitMemory, Splits
from loongjax.scheduler.esp.times import Times
from loongjax.scheduler.esp.window import Window

ROUNDING = 1e-9
"""More than what sums of times x weights in another order may differ by."""
PlacedBatch = tuple[list[int], list[InstanceId]]
"""One batch: its requests, by their places in the window, and its group."""


class Splitter:
    """Splits requests and instances into batches, and the same requests once more on fewer instances."""

    def __init__(self, draft: Draft, window: Window, times: Times, memory: SplitMemory) -> None:
        self._draft = draft
        self._window = window
        self._times = times
        self._memory = memory
        self._by_length: list[int] = []
        self._splits: Splits | None = None

    def split(self, places: list[int], instances: list[InstanceId]) -> list[PlacedBatch]:
        """The batches of these requests. If memory is too scattered for all of them, the last in queue order are left
        out, half of them at a time.
        """
        by_length = self._window.longest_first(places)
        while by_length:
            self._by_length, self._splits = by_length, self._splits_of(by_length, instances)
            if batches := self._batches(self._splits, instances):
                return batches
            left_out = set(sorted(by_length)[-(-len(by_length) // 2) :] if len(by_length) > 1 else by_length)
            by_length = [place for place in by_length if place not in left_out]
        return []

    def split_on_fewer(self, instances: list[InstanceId]) -> list[PlacedBatch]:
        """The requests of the last batches on some of their instances, in the same order; none if there is no room."""
        splits = self._splits
        assert splits is not None, "nothing was split before"
        return self._batches(
            self._splits_of(self._by_length, instances) if splits.is_memory_short else splits, instances
        )

    def least_cost_on_fewer(self, num_instances: int) -> float:
        """What the requests of the last batches cost at least on so many instances: their times x weights."""
        splits = self._splits
        assert splits is not None, "nothing was split before"
        return 0.0 if splits.is_memory_short else (1.0 - ROUNDING) * splits.least_cost(num_instances)

    def _splits_of(self, by_length: list[int], instances: list[InstanceId]) -> Splits:
        draft, page_size = self._draft, self._draft.shape.page_size
        question = Question(
            loads=self._window.loads(by_length),
            free_tokens=[draft.room(instance) * page_size for instance in instances],
            seconds=self._times.on_first(len(instances)),
            max_tokens_per_instance=draft.view.max_num_batched_tokens,
            max_requests=draft.view.max_num_seqs,
        )
        return self._memory.splits(question)

    def _batches(self, splits: Splits, instances: list[InstanceId]) -> list[PlacedBatch]:
        return [
            (
                self._by_length[batch.requests.start : batch.requests.stop],
                instances[batch.instances.start : batch.instances.stop],
            )
            for batch in splits.on_first(len(instances)) or ()
        ]
