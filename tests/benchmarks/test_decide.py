"""The clusters that deciding is timed on: their answers can be executed, and do what the case is about."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from benchmarks.decide import CASES, LLAMA3_8B, Case, main, make_view
from loongjax.core.plan import Prefill
from loongjax.costmodel.roofline import DeviceRates, RooflineModel
from loongjax.scheduler.esp.config import EspConfig
from loongjax.scheduler.esp.policy import EspPolicy
from loongjax.scheduler.validate import check_plan


def answer(case: Case, seed: int) -> tuple[object, ...]:
    view = make_view(case, np.random.default_rng(seed))
    model = RooflineModel(rates=DeviceRates.of_device("NVIDIA H200"), model=LLAMA3_8B)
    plans = EspPolicy(EspConfig(max_picked=case.max_picked), model).plan(view)
    check_plan(view, plans)
    return plans


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.num_instances < 100])
def test_every_answer_can_be_executed(name: str) -> None:
    case = CASES[name]
    if case.num_instances > 8:
        case = dataclasses.replace(case, num_running=512, num_waiting=500)
    for seed in range(3):
        plans = answer(case, seed)
        assert any(isinstance(plan, Prefill) for plan in plans) or not name.startswith("half")


def test_results_say_what_was_measured(tmp_path: pathlib.Path) -> None:
    out = tmp_path / "decide.json"
    assert main(["--samples", "2", "--case", "a step ends", "--out", str(out)]) == 0
    result = json.loads(out.read_text())["cases"]["a step ends"]
    assert (result["num_instances"], result["num_running"], result["num_waiting"]) == (8, 256, 1000)
    assert 0.0 < result["p50_ms"] <= result["p99_ms"]
