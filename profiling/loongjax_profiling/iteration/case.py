"""What is measured: one iteration of requests of equal length, on one strategy."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from loongjax.costmodel.work import DecodeTotals, PrefillWork, Strategy
from loongjax.errors import ConfigError

Kind = Literal["prefill", "decode", "extend", "migration"]


def kind_of(name: str) -> Kind:
    """The kind of this name. Raises ConfigError if there is none."""
    for kind in get_args(Kind):
        if kind == name:
            return kind
    raise ConfigError(f"the kind of an iteration is one of {', '.join(get_args(Kind))}, got {name!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """An iteration to measure; a value that identifies its time on given devices with a given model.

    Raises:
        ConfigError: sizes that no iteration of this kind has.
    """

    kind: Kind
    strategy: Strategy
    """A migration is between two instances: sp 2. An extend is on one: sp 1."""
    batch_size: int = 1
    """Requests."""
    input_len: int
    """Tokens of each request: of its prompt; of its chunk, at least two; whose keys are there before the first decode
    step; or that migrate."""
    num_masters: int = 0
    """Instances that own a sub-batch of a decode; 0 in other kinds."""
    scales_down: bool = False
    """Whether a prefill leaves its keys on the fewest instances that hold them, instead of evenly on all."""
    past_len: int = 0
    """Tokens of each request of an extend whose keys are there before; 0 in other kinds."""
    num_decodes: int = 0
    """Requests of one new token beside the chunks of an extend; 0 in other kinds."""

    def __post_init__(self) -> None:
        is_possible = (
            min(self.batch_size, self.input_len) >= 1
            and (self.num_masters > 0) == (self.kind == "decode")
            and 0 <= self.num_masters <= min(self.strategy.sp, self.batch_size)
            and (self.kind == "prefill" or not self.scales_down)
            and (self.kind != "migration" or self.strategy.sp == 2)
            and (self.past_len > 0) == (self.kind == "extend")
            and self.past_len >= 0
            and (self.kind != "extend" or (self.strategy.sp == 1 and self.input_len > 1))
            and (self.num_decodes == 0 or (self.kind == "extend" and self.num_decodes > 0))
        )
        if not is_possible:
            raise ConfigError(f"there is no such iteration: {self!r}")

    def __str__(self) -> str:
        match self.kind:
            case "migration":
                return f"migration of {self.input_len} tokens, tp{self.strategy.tp}"
            case "prefill":
                suffix = ", scaled down" if self.scales_down else ""
            case "decode":
                suffix = f", {self.num_masters} masters"
            case "extend":
                suffix = f", behind {self.past_len} each, beside {self.num_decodes} decodes"
        return f"{self.kind} of {self.batch_size} x {self.input_len} on {self.strategy}{suffix}"

    def shrunk(self, divisor: int) -> Case:
        """With all lengths divided, rounded up; a chunk keeps two tokens, since one would be a decode."""
        least = 2 if self.kind == "extend" else 1
        input_len = max(least, -(-self.input_len // divisor))
        return dataclasses.replace(self, input_len=input_len, past_len=-(-self.past_len // divisor))

    @property
    def num_requests(self) -> int:
        return self.batch_size + self.num_decodes

    @property
    def num_tokens(self) -> int:
        """Of all requests; of an extend those that are new."""
        return self.batch_size * self.input_len + self.num_decodes

    @property
    def prefill_work(self) -> PrefillWork:
        """Of a prefill or an extend."""
        new_lens = (self.input_len,) * self.batch_size + (1,) * self.num_decodes
        return PrefillWork(new_lens=new_lens, past_lens=(self.past_len,) * len(new_lens) if self.past_len else ())

    @property
    def decode_totals(self) -> DecodeTotals:
        """With keys as even as they can be."""
        return DecodeTotals.even(self.strategy, self.batch_size, self.num_tokens + self.batch_size, self.num_masters)
