"""Taking an instance out of decoding by moving the keys that it holds: the consolidation behind equation 4.

What moves decodes more slowly from then on, with more company, and so does that company. The paper's cost is the
transfer alone; here the longer steps count too, for every request by its weight times the tokens that are still to
come (`objective.step_weights`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

from loongjax.core.cluster import InstanceId
from loongjax.scheduler.draft import Draft
from loongjax.scheduler.esp.outlook import Outlook, Site, step_s
from loongjax.scheduler.esp.output_lengths import OutputLengths
from loongjax.scheduler.esp.times import Times
from loongjax.scheduler.fairness import Fairness
from loongjax.scheduler.request_view import RunningView


@dataclasses.dataclass(frozen=True)
class Move:
    """All keys that `source` holds, to one other instance."""

    source: InstanceId
    target: InstanceId
    requests: tuple[RunningView, ...]
    """Those with keys on the source, oldest first."""
    seconds: float
    """What moving them takes, one request after the other."""


class Mover:
    """Finds out what it would take to free an instance."""

    def __init__(
        self,
        draft: Draft,
        outlook: Outlook,
        times: Times,
        fairness: Fairness,
        lengths: OutputLengths,
        *,
        min_tokens_between_migrations: int,
    ) -> None:
        self._draft = draft
        self._outlook = outlook
        self._times = times
        self._fairness = fairness
        self._lengths = lengths
        self._min_tokens_between_migrations = min_tokens_between_migrations

    def move_from(
        self, site: Site, excluded: Collection[Site], within_s: float, *, is_forced: bool = False
    ) -> Move | None:
        """The move that frees one instance of a decode group, the one with fewest keys; None if there is none.

        The target has room for everything. It is of the same group, or else the fullest of any other.

        Args:
            site: the decode group.
            excluded: groups that nothing is moved to.
            within_s: the longest that it may take.
            is_forced: whether keys may move that have moved just now.
        """
        assert site.facts is not None, site
        num_keys = site.facts.num_keys
        source = min(site.instances, key=num_keys.__getitem__)
        seconds = self._times.migration_s(num_keys[source])
        if seconds > within_s:
            return None
        requests = self._draft.residents[source]
        if not requests or not self._may_move(requests, is_forced):
            return None
        target = self._target(site, source, requests, excluded)
        if target is None:
            return None
        return Move(source, target, requests, seconds)

    def start(self, move: Move) -> None:
        """Moves the keys of the oldest request if both instances are idle; they are held in any case."""
        draft = self._draft
        if {move.source, move.target} <= draft.idle:
            request = move.requests[0]
            self._fairness.note_migrated(request)
            draft.migrate(request.request_id, move.source, move.target, dict(request.kv)[move.source])
        draft.reserve([move.source, move.target])

    def slowdown(self, site: Site, move: Move) -> float:
        """What it costs, in seconds x weight, that steps are longer after this move from the site."""
        source, target = move.source, move.target
        if target in site.instances:
            together = Site(instances=tuple([i for i in site.instances if i != source]), requests=site.requests)
            return self._cost_of_steps(site, self._step_s(together))
        other = next(other for other in self._outlook.decodes if target in other.instances)
        together = Site(
            instances=tuple(sorted({*site.instances, *other.instances} - {source})),
            requests=(*site.requests, *other.requests),
        )
        together_s = self._step_s(together)
        return self._cost_of_steps(site, together_s) + self._cost_of_steps(other, together_s)

    def _cost_of_steps(self, site: Site, then_s: float) -> float:
        """Of steps that take so long from now on."""
        assert site.facts is not None, site
        now_s = self._step_s(site)
        return site.facts.weight_of_steps(self._draft.view.now_s, now_s) * max(0.0, then_s - now_s)

    def _step_s(self, site: Site) -> float:
        return step_s(site, self._times)

    def _may_move(self, requests: Sequence[RunningView], is_forced: bool) -> bool:
        may_migrate, least = self._fairness.may_migrate, self._min_tokens_between_migrations
        if not is_forced and not all(may_migrate(request, least) for request in requests):
            return False
        prefilling = self._draft.prefilling
        return not prefilling or all(instance not in prefilling for request in requests for instance, _ in request.kv)

    def _target(
        self, site: Site, source: InstanceId, requests: tuple[RunningView, ...], excluded: Collection[Site]
    ) -> InstanceId | None:
        draft = self._draft
        shape = draft.shape
        num_newest = draft.num_newest[source]
        num_pages = sum([shape.num_pages_for(dict(request.kv)[source]) for request in requests])
        partners = [instance for instance in site.instances if instance != source]
        others = [
            instance
            for other in self._outlook.decodes
            if other is not site and other not in excluded
            for instance in other.instances
        ]
        for instances in (partners, others):
            fitting = [
                instance
                for instance in instances
                if draft.room(instance) >= num_pages
                and draft.num_newest[instance] + num_newest <= draft.view.max_num_seqs
            ]
            if fitting:
                return min(fitting, key=lambda instance: (draft.room(instance), instance))
        return None
