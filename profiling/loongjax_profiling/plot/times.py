"""The times that figures are drawn from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from loongjax.errors import ConfigError
from loongjax_profiling.iteration.case import Case
from loongjax_profiling.iteration.grids import Grid, GridName, build_grid


@dataclasses.dataclass(frozen=True, kw_only=True)
class Times:
    """Measured times of one system, and how the points were chosen."""

    seconds: Mapping[Case, float]
    system: str
    """In words, for titles."""
    num_devices: int
    """That were there when they were measured."""
    shrink: int = 1
    """What lengths were divided by."""

    def grid(self, name: GridName) -> Grid:
        """The points of this group as they were measured here."""
        return build_grid(name, num_devices=self.num_devices, shrink=self.shrink)

    def require(self, name: GridName, cases: Iterable[Case]) -> list[Case]:
        """Those of these points of a group that are there.

        Raises:
            ConfigError: none is; the message says what measures them.
        """
        there = [case for case in cases if case in self.seconds]
        if not there:
            raise ConfigError(
                f"the database lacks the points of {name} for {self.num_devices} devices with lengths divided by "
                f"{self.shrink}: `loongjax profile iteration --grid {name} --shrink {self.shrink} --db FILE` measures "
                "them on the machine and with the model that the others are from; if they are there with lengths "
                "divided otherwise, give --shrink"
            )
        return there
