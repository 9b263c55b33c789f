"""What the first step of a decode takes is told apart from what the others take."""

from __future__ import annotations

import json
import pathlib

import pytest

from benchmarks.decode_begin import main, measure
from loongjax.core.iteration import DecodeIteration, Iteration
from loongjax.costmodel.work import Strategy
from loongjax_profiling.iteration.case import Case
from loongjax_profiling.iteration.meter import Meter, MeterConfig
from loongjax_profiling.replay.traced_runtime import TracedRuntime
from tests.profiling.iteration.scripted_runtime import ScriptedRuntime

DECODE = Case(kind="decode", strategy=Strategy(2), batch_size=3, input_len=40, num_masters=2)
PREFILL = Case(kind="prefill", strategy=Strategy(2), batch_size=1, input_len=40)


def test_first_second_and_further_steps_are_told_apart() -> None:
    """A step takes 5 ms, one that begins 11, or 13 behind a prefill, and the one behind it 7."""
    kinds: list[str] = []

    def seconds(iteration: Iteration, _: int) -> float:
        if not isinstance(iteration, DecodeIteration):
            kinds.append("prefill")
            return 0.1
        before = kinds[-1] if kinds else ""
        kinds.append("decode" if iteration.continues else "begin")
        if not iteration.continues:
            return 0.013 if before == "prefill" else 0.011
        return 0.007 if before == "begin" else 0.005

    runtime = TracedRuntime(ScriptedRuntime(seconds))
    meter = Meter(runtime, MeterConfig(rounds=1, num_steps=4))
    begin = measure(meter, runtime, DECODE, PREFILL, repeats=3)
    assert (begin.dop, begin.num_rows, begin.num_keys) == (2, 3, 40)
    assert begin.first_ms == pytest.approx(11.0)
    assert begin.behind_prefill_ms == pytest.approx(13.0)
    assert begin.second_ms == pytest.approx(7.0)
    assert begin.step_ms == pytest.approx(5.0)


def test_a_real_runtime_is_measured(tmp_path: pathlib.Path) -> None:
    out = tmp_path / "begin.json"
    arguments = ["--shape", "tiny", "--dops", "1", "2", "--rows", "2", "--keys", "32", "--num-slots", "1024"]
    assert main([*arguments, "--repeats", "2", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert [(row["dop"], row["num_rows"], row["num_keys"]) for row in report["rows"]] == [(1, 2, 32), (2, 2, 32)]
    assert all(row[name] > 0.0 for row in report["rows"] for name in ("first_ms", "behind_prefill_ms", "step_ms"))
    assert report["shape"] == "tiny"
    assert report["command"].endswith("--repeats 2 --out " + str(out))
