"""The log-probabilities of a prompt, as arrays until somebody reads them token by token."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np

from loongjax.core.request import TokenLogprobs


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PromptLogprobs(Sequence[TokenLogprobs]):
    """One `TokenLogprobs` for every prompt token but the first, each made when it is asked for.

    A long prompt has many: as objects they would take a microsecond or more each of Python's lock where they are read
    back, where they are pickled, and where they are unpickled. As arrays they are only copied.
    """

    token_ids: np.ndarray
    """int32 [T - 1]"""
    logprobs: np.ndarray
    """float32 [T - 1]"""
    ranks: np.ndarray
    """int32 [T - 1]; 1 for the most probable token."""
    top_ids: np.ndarray
    """int32 [T - 1, number asked for], most probable first; -1 beyond the vocabulary."""
    top_logprobs: np.ndarray
    """float32 [T - 1, number asked for]"""

    def __post_init__(self) -> None:
        lengths = {len(column) for column in self._columns}
        assert len(lengths) == 1, lengths

    def __len__(self) -> int:
        return len(self.token_ids)

    def __iter__(self) -> Iterator[TokenLogprobs]:
        for token_id, logprob, rank, ids, logprobs in zip(*(column.tolist() for column in self._columns), strict=True):
            top = tuple([pair for pair in zip(ids, logprobs, strict=True) if pair[0] >= 0])
            yield TokenLogprobs(token_id, logprob, rank, top)

    @overload
    def __getitem__(self, index: int) -> TokenLogprobs: ...
    @overload
    def __getitem__(self, index: slice) -> PromptLogprobs: ...
    def __getitem__(self, index: int | slice) -> TokenLogprobs | PromptLogprobs:
        if isinstance(index, slice):
            return self._part(index)
        index = range(len(self))[index]
        (token,) = self._part(slice(index, index + 1))
        return token

    @property
    def _columns(self) -> tuple[np.ndarray, ...]:
        return self.token_ids, self.logprobs, self.ranks, self.top_ids, self.top_logprobs

    def _part(self, rows: slice) -> PromptLogprobs:
        names = (field.name for field in dataclasses.fields(self))
        return PromptLogprobs(**{name: column[rows] for name, column in zip(names, self._columns, strict=True)})
