"""A cost model for arithmetic by hand, and short ways to ask the policy with it."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from loongjax.core.plan import Plan
from loongjax.costmodel.model import CostModel, Source
from loongjax.costmodel.work import DecodeTotals, PrefillTotals, Strategy, larger
from loongjax.scheduler.esp.config import EspConfig
from loongjax.scheduler.esp.explain import Decision
from loongjax.scheduler.esp.objective import TOKEN_S
from loongjax.scheduler.esp.policy import EspPolicy
from loongjax.scheduler.validate import check_plan
from loongjax.scheduler.view import ClusterView
from tests.scheduler.esp.explained import check_terms


@dataclasses.dataclass(frozen=True, kw_only=True)
class HandModel(CostModel):
    """Prefill: max(floor, constant + token x tokens / sp + squared_token x sum(len^2) / sp). Decode: step + row x rows
    of the busiest master + key x keys of the fullest instance + exchange x (sp - 1). Migration: moved x tokens.
    """

    floor_s: float = 0.0
    constant_s: float = 0.0
    token_s: float = 0.01
    squared_token_s: float = 0.0
    step_s: float = 2.0
    row_s: float = 0.0
    key_s: float = 0.0
    exchange_s: float = 0.0
    moved_s: float = 0.0001

    @property
    def source(self) -> Source:
        return "fitted"

    def prefill_s[Real: (float, np.ndarray)](self, strategy: Strategy, totals: PrefillTotals[Real]) -> Real:
        work = self.token_s * totals.num_tokens + self.squared_token_s * totals.squared_lens
        return larger(self.constant_s + work / strategy.sp, self.floor_s)

    def decode_s[Real: (float, np.ndarray)](self, strategy: Strategy, totals: DecodeTotals[Real]) -> Real:
        own = self.step_s + self.row_s * totals.busiest_rows + self.key_s * totals.busiest_keys
        return own + self.exchange_s * (strategy.sp - 1)

    def migration_s(self, num_tokens: int | float, tp: int) -> float:
        return self.moved_s * num_tokens


def policy_of(model: HandModel, decisions: list[Decision] | None = None, **settings: object) -> EspPolicy:
    """Prompts weigh as in the paper, which makes for easy sums."""
    config = EspConfig(**({"growth_tokens": 4, "implied_ttft_s": math.inf, "implied_tpot_s": TOKEN_S} | settings))  # pyright: ignore[reportArgumentType]
    return EspPolicy(config, model, explain=None if decisions is None else decisions.append)


def ask(
    view: ClusterView, model: HandModel | None = None, **settings: object
) -> tuple[tuple[Plan, ...], list[Decision]]:
    """A new policy's answer, which can be executed, and why: the terms of each decision say it all."""
    decisions: list[Decision] = []
    plans = policy_of(model or HandModel(), decisions, **settings).plan(view)
    check_plan(view, plans)
    for decision in decisions:
        check_terms(decision)
    return plans, decisions


def only(decisions: list[Decision], step: str) -> Decision:
    (decision,) = [decision for decision in decisions if decision.step == step]
    return decision
