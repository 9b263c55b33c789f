"""What the engines of a benchmark did elastically, simulated or real."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Mapping

from loongjax.engine.client import EngineStats


@dataclasses.dataclass(frozen=True, kw_only=True)
class Elasticity:
    """Over all groups of a benchmark."""

    num_scale_ups: int
    """Times a decode group gained an instance."""
    decode_steps_by_dop: Mapping[int, int]
    """Decode steps, by degree of parallelism, ascending."""

    @classmethod
    def of(cls, stats: Iterable[EngineStats]) -> Elasticity:
        """What these engines did together."""
        num_scale_ups = 0
        steps: collections.Counter[int] = collections.Counter()
        for each in stats:
            num_scale_ups += each.num_scale_ups
            steps.update(each.decode_dop)
        return cls(num_scale_ups=num_scale_ups, decode_steps_by_dop=dict(sorted(steps.items())))

    def __str__(self) -> str:
        steps = ", ".join(f"{num_steps} on DoP {dop}" for dop, num_steps in self.decode_steps_by_dop.items())
        return f"decode groups gained an instance {self.num_scale_ups} times; decode steps: {steps or 'none'}"
