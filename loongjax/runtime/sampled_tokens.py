"""What iterations have sampled and the host has not read yet, for those that are submitted behind them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from loongjax.core.cluster import Group
from loongjax.core.request import Request
from loongjax.parallel.mesh import DeviceGrid
from loongjax.runtime.programs import BY_RANK, await_step


@dataclasses.dataclass(frozen=True)
class _Sampled:
    requests: Sequence[Mapping[int, Request]]
    """By rank, each by its row."""
    token_ids: jax.Array
    """int32 [n, R]"""

    @property
    def places(self) -> dict[str, int]:
        """By request id: rank * R + row."""
        num_rows = self.token_ids.shape[1]
        return {
            request.request_id: rank * num_rows + row
            for rank, by_row in enumerate(self.requests)
            for row, request in by_row.items()
        }


class SampledTokens:
    """The tokens of each group's last iteration, on its devices."""

    def __init__(self, grid: DeviceGrid) -> None:
        self._grid = grid
        self._of: dict[Group, _Sampled] = {}

    def keep(self, group: Group, requests: Sequence[Mapping[int, Request]], token_ids: jax.Array) -> None:
        """Instead of what iterations before it on its instances have sampled.

        Args:
            group: whose iteration it was.
            requests: by rank, each by its row.
            token_ids: int32 [n, R].
        """
        if group not in self._of:
            for other in list(self._of):
                if not other.isdisjoint(group):
                    self._of.pop(other, None)
        self._of[group] = _Sampled(requests, token_ids)

    def fill_in(self, group: Group, token_ids: jax.Array, awaited: Mapping[tuple[int, int], str]) -> jax.Array:
        """The input tokens of a group's next iteration, with those that the last one has sampled.

        Args:
            group: the same that sampled them.
            token_ids: int32 [n, T], those that the host knew.
            awaited: ids of the requests whose tokens it did not, by rank and row.
        """
        sampled = self._of[group]
        places = sampled.places
        sources = np.full(token_ids.shape, -1, np.int32)
        for row, request_id in awaited.items():
            sources[row] = places[request_id]
        return await_step(token_ids, jax.device_put(sources, self._grid.sharding(group, BY_RANK)), sampled.token_ids)

    def clear(self) -> None:
        """Lets go of all of them."""
        self._of.clear()
