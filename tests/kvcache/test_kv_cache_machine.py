"""Every operation of the KV cache, in any order, against a model that is nothing but lists of tokens."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from loongjax.core.cluster import ClusterShape
from loongjax.core.plan import TokenInterval
from loongjax.kvcache.kv_cache import KVCache
from loongjax.kvcache.page_pool import OutOfPagesError

Content = dict[str, dict[int, list[int]]]
"""request id -> instance -> its tokens, in local order"""


class KVCacheMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.model: Content = {}
        self.memory: dict[tuple[int, int], tuple[str, int]] = {}
        """(instance, slot) -> the (request, token) that was last written there, as a device would hold it"""
        self.num_created = 0

    @initialize(num_instances=st.integers(1, 4), num_pages=st.integers(0, 12), page_size=st.sampled_from([1, 3, 16]))
    def start(self, num_instances: int, num_pages: int, page_size: int) -> None:
        self.shape = ClusterShape(num_instances=num_instances, num_pages=num_pages, page_size=page_size)
        self.cache = KVCache(self.shape)

    def pages(self, num_tokens: int) -> int:
        return (num_tokens + self.shape.page_size - 1) // self.shape.page_size

    def free(self, instance: int) -> int:
        return self.shape.num_pages - sum(self.pages(len(held.get(instance, []))) for held in self.model.values())

    def draw_request(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(sorted(self.model)))

    def draw_instance(self, data: st.DataObject) -> int:
        return data.draw(st.integers(0, self.shape.num_instances - 1))

    @rule(data=st.data())
    def keep(self, data: st.DataObject) -> None:
        page_size = self.shape.page_size
        parts = data.draw(
            st.lists(st.tuples(st.integers(0, self.shape.num_instances - 1), st.integers(1, 3)), max_size=4)
        )
        last_page = data.draw(st.integers(1, page_size))
        intervals, position = [], 0
        for index, (instance, num_pages) in enumerate(parts):
            end = position + num_pages * page_size
            if index == len(parts) - 1:
                end += last_page - page_size
            intervals.append(TokenInterval(instance, position, end))
            position = end
        request_id = f"r{self.num_created}"
        held: dict[int, list[int]] = {}
        for interval in intervals:
            held.setdefault(interval.instance, []).extend(range(interval.begin, interval.end))
        fits = all(self.pages(len(tokens)) <= self.free(instance) for instance, tokens in held.items())
        assert self.cache.can_keep(intervals) == fits
        if not fits:
            with pytest.raises(OutOfPagesError):
                self.cache.keep(request_id, intervals)
            return
        self.num_created += 1
        kept = self.cache.keep(request_id, intervals)
        assert [(part.instance, part.begin, part.end) for part in kept] == [
            (interval.instance, interval.begin, interval.end) for interval in intervals
        ]
        self.model[request_id] = held
        for part in kept:
            for token, slot in zip(range(part.begin, part.end), part.slots.tolist(), strict=True):
                self.memory[part.instance, slot] = (request_id, token)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), repeat=st.integers(1, 20))
    def append(self, data: st.DataObject, repeat: int) -> None:
        request_id, instance = self.draw_request(data), self.draw_instance(data)
        for _ in range(repeat):
            held = self.model[request_id]
            num_local = len(held.get(instance, []))
            fits = num_local % self.shape.page_size != 0 or self.free(instance) > 0
            assert self.cache.can_append([request_id], instance) == fits
            if not fits:
                with pytest.raises(OutOfPagesError):
                    self.cache.append(request_id, instance)
                return
            token = sum(len(tokens) for tokens in held.values())
            slot = self.cache.append(request_id, instance)
            held.setdefault(instance, []).append(token)
            self.memory[instance, slot] = (request_id, token)

    @precondition(lambda self: any(self.model.values()) and self.shape.num_instances > 1)
    @rule(data=st.data(), comes_back=st.booleans())
    def migrate(self, data: st.DataObject, comes_back: bool) -> None:
        request_id = data.draw(st.sampled_from(sorted(name for name, held in self.model.items() if held)))
        held = self.model[request_id]
        source = data.draw(st.sampled_from(sorted(held)))
        target = data.draw(st.sampled_from([i for i in self.shape.all_instances if i != source]))
        num_tokens = data.draw(st.integers(1, len(held[source])))
        self.move(request_id, source, target, num_tokens)
        if comes_back and len(held.get(target, [])) >= num_tokens:
            self.move(request_id, target, source, num_tokens)

    def move(self, request_id: str, source: int, target: int, num_tokens: int) -> None:
        held = self.model[request_id]
        num_there = len(held.get(target, []))
        if self.pages(num_there + num_tokens) - self.pages(num_there) > self.free(target):
            with pytest.raises(OutOfPagesError):
                self.cache.migrate(request_id, source, target, num_tokens)
            return
        source_slots, target_slots = self.cache.migrate(request_id, source, target, num_tokens)
        moved = held[source][-num_tokens:]
        del held[source][-num_tokens:]
        if not held[source]:
            del held[source]
        held.setdefault(target, []).extend(moved)
        for token, old, new in zip(moved, source_slots.tolist(), target_slots.tolist(), strict=True):
            assert self.memory[source, old] == (request_id, token)
            self.memory[target, new] = (request_id, token)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        request_id = self.draw_request(data)
        self.cache.release(request_id)
        del self.model[request_id]

    @invariant()
    def the_cache_is_whole(self) -> None:
        if hasattr(self, "cache"):
            self.cache.check_integrity()

    @invariant()
    def pages_are_accounted_exactly(self) -> None:
        if hasattr(self, "cache"):
            for instance in self.shape.all_instances:
                assert self.cache.free_pages(instance) == self.free(instance)
                assert self.cache.used_pages(instance) == self.shape.num_pages - self.free(instance)

    @invariant()
    def tables_lead_to_every_token(self) -> None:
        for request_id, held in self.model.items():
            assert dict(self.cache.local_lens(request_id)) == {i: len(tokens) for i, tokens in held.items()}
            assert self.cache.num_tokens(request_id) == sum(map(len, held.values()))
            if held:
                assert self.cache.holders(request_id)[-1] == max(held, key=lambda instance: max(held[instance]))
            for table in self.cache.tables(request_id):
                slots = table.page_indices.repeat(self.shape.page_size) * self.shape.page_size
                slots = slots + np.resize(np.arange(self.shape.page_size), len(slots))
                found = [self.memory[table.instance, int(slot)] for slot in slots[: table.num_tokens]]
                assert found == [(request_id, token) for token in held[table.instance]]


KVCacheMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestKVCacheMachine = KVCacheMachine.TestCase
