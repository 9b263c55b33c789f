"""What follows from the requests of a decode group, worked out once for as long as they stay as they are."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

from loongjax.core.cluster import InstanceId
from loongjax.scheduler.components import Component
from loongjax.scheduler.esp.objective import TOKEN_S, decode_weights, plain_decode_weights, step_weights
from loongjax.scheduler.esp.output_lengths import OutputLengths
from loongjax.scheduler.running import Running

MAX_REMEMBERED = 1 << 12
"""Groups that are remembered; then all are forgotten."""


class GroupFacts:
    """A decode group: its instances, its requests, and what both mean."""

    def __init__(
        self,
        instances: tuple[InstanceId, ...],
        requests: Running,
        lengths: OutputLengths,
        implied_tpot_s: float = TOKEN_S,
    ) -> None:
        """Facts of these requests, oldest first, on these instances, ascending, by what is known of outputs now."""
        self._implied_tpot_s = implied_tpot_s
        self.instances = instances
        self.requests = requests
        self.lengths = lengths.copy()
        self.timeless_weight: float | None = None
        """What a pause costs, as soon as that is known and if it does not depend on the time."""
        dop = len(instances)
        self.size_of_step = dop, len(requests), -(-requests.num_tokens // dop)
        """Degree of parallelism, rows, and keys of the fullest instance if they are even."""

    def still_hold(self, requests: Running, lengths: OutputLengths) -> bool:
        """Whether these are the same requests, unchanged, and no more is known of outputs."""
        # Views are made anew only if something changed, and tuples look at identity first.
        return self.lengths.knows_the_same(lengths) and self.requests == requests

    @functools.cached_property
    def has_paces(self) -> bool:
        """Whether what a pause costs depends on the time."""
        return self.requests.have_paces

    def pause_weight(self, now_s: float, step_s: float) -> float:
        """What it costs a second that all of them stand still, if each further token takes at least `step_s`."""
        if self.has_paces:
            return sum(decode_weights(self.requests, now_s, self.lengths, step_s, self._implied_tpot_s))
        if self.timeless_weight is None:
            self.timeless_weight = sum(decode_weights(self.requests, 0.0, self.lengths, 0.0, self._implied_tpot_s))
        return self.timeless_weight

    @functools.cached_property
    def num_keys(self) -> dict[InstanceId, int]:
        """On each instance."""
        if len(self.instances) == 1:
            return {self.instances[0]: self.requests.num_tokens}
        num_keys = dict.fromkeys(self.instances, 0)
        for request in self.requests:
            for instance, num_tokens in request.kv:
                num_keys[instance] = num_keys.get(instance, 0) + num_tokens
        return num_keys

    @functools.cached_property
    def num_steps_left(self) -> float:
        """Steps until the last of them is expected to end."""
        return max(0.0, max(self.lengths.expected_left(*self.requests.outputs)))

    def weight_of_steps(self, now_s: float, step_s: float) -> float:
        """What it costs that all steps still to come take a second longer each, if one takes at least `step_s`."""
        return self._sum_of_step_weights(now_s, step_s) if self.has_paces else self._timeless_weight_of_steps

    @functools.cached_property
    def _timeless_weight_of_steps(self) -> float:
        return self._sum_of_step_weights(0.0, 0.0)

    def _sum_of_step_weights(self, now_s: float, step_s: float) -> float:
        return sum(step_weights(self.requests, now_s, self.lengths, step_s, self._implied_tpot_s))


class GroupMemory:
    """The facts of the decode groups that a policy met, by their instances.

    While one group decodes, the others stay as they are: most questions find most groups here.
    """

    def __init__(self, implied_tpot_s: float = TOKEN_S) -> None:
        """`implied_tpot_s`: see `objective.decode_weights`."""
        self._implied_tpot_s = implied_tpot_s
        self._facts: dict[tuple[InstanceId, ...], GroupFacts] = {}

    def facts_of(self, component: Component, lengths: OutputLengths) -> GroupFacts:
        """Of a group of at least one request."""
        instances = tuple(component.instances) if len(component.instances) == 1 else tuple(sorted(component.instances))
        facts = self._facts.get(instances)
        if facts is None or not facts.still_hold(component.requests, lengths):
            if len(self._facts) >= MAX_REMEMBERED:
                self._facts.clear()
            facts = self._facts[instances] = GroupFacts(instances, component.requests, lengths, self._implied_tpot_s)
        return facts

    def weigh(self, groups: Sequence[GroupFacts]) -> None:
        """Works out what pauses cost, of all groups in which nobody has wishes or priorities at once: where limits of
        outputs matter, of many it takes hardly longer than of one.
        """
        unknown = [group for group in groups if group.timeless_weight is None and group.requests.are_plain]
        if len(unknown) < 2:
            return
        num_outputs: list[int] = []
        max_outputs: list[int] = []
        for group in unknown:
            generated, limits = group.requests.outputs
            num_outputs += generated
            max_outputs += limits
        weights = iter(plain_decode_weights(num_outputs, max_outputs, unknown[0].lengths, self._implied_tpot_s))
        for group in unknown:
            group.timeless_weight = sum(itertools.islice(weights, len(group.requests)))
