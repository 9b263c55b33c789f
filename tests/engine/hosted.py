"""Engines for threads and child processes: picklable factories over the fake runtime."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

from loongjax.core.iteration import Iteration
from loongjax.engine.core import EngineCore
from loongjax.errors import CheckpointError
from tests.engine.cluster import Cluster
from tests.engine.fake_runtime import VOCAB_SIZE


@dataclasses.dataclass(frozen=True)
class Factory:
    """Builds an engine of this cluster; from iteration `fails_from` on, all fail."""

    cluster: Cluster = dataclasses.field(default_factory=Cluster)
    fails_from: int | None = None
    needs_environment: str | None = None

    def __call__(self) -> EngineCore:
        if self.needs_environment is not None and self.needs_environment not in os.environ:
            raise CheckpointError(f"{self.needs_environment} is not set")
        return self.cluster.core(self.cluster.runtime(fails=self._fails))

    def _fails(self, iteration: Iteration) -> bool:
        return self.fails_from is not None and iteration.iteration_id >= self.fails_from


def cannot_be_built() -> EngineCore:
    raise CheckpointError("model.safetensors is cut short")


def breaks_while_built() -> EngineCore:
    raise ZeroDivisionError("of all things")


class LetterTokenizer:
    """One letter a token."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(letter) - 48 for letter in text]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return "".join(
            chr(48 + token_id)
            for token_id in token_ids
            if token_id < VOCAB_SIZE and (token_id or not skip_special_tokens)
        )
