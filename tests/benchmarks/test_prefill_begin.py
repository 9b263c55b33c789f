"""Prefills alone, in a row and beside decodes are told apart."""

from __future__ import annotations

import json
import pathlib

import pytest

from benchmarks.prefill_begin import main, make_requests, measure
from loongjax.core.iteration import Iteration, PrefillIteration
from loongjax_profiling.replay.traced_runtime import TracedRuntime
from tests.engine.cluster import Cluster
from tests.engine.fake_runtime import VOCAB_SIZE, FakeRuntime

CLUSTER = Cluster(num_instances=1, num_pages=256, max_model_len=1000, max_num_batched_tokens=1000)


def test_each_kind_is_measured_by_itself() -> None:
    """A prefill takes 6 s on idle devices, 5 behind another and 7 behind a decode, whose steps take one."""
    seconds = {"idle": 6.0, "prefill": 5.0, "decode": 7.0}
    seen: list[str] = []

    def duration_s(iteration: Iteration) -> float:
        if not isinstance(iteration, PrefillIteration):
            return 1.0
        before = "idle"
        if fake._results:
            before = "prefill" if isinstance(fake.submitted[-2], PrefillIteration) else "decode"
        seen.append(before)
        return seconds[before]

    fake: FakeRuntime = CLUSTER.runtime(duration_s=duration_s)
    runtime = TracedRuntime(fake)
    core = CLUSTER.core(runtime)  # pyright: ignore[reportArgumentType]
    decodes = make_requests("decode", 3, num_tokens=8, max_tokens=500, vocab_size=VOCAB_SIZE)
    begin = measure(core, runtime, 20, decodes, repeats=4)
    assert (begin.num_tokens, begin.in_a_row_ms, begin.alone_ms, begin.beside_decode_ms) == (20, 5e3, 6e3, 7e3)
    assert begin.beside_decode_p90_ms == 7e3
    assert begin.lead_ms == pytest.approx(1e3)
    assert begin.num_late == 0
    assert core.is_idle
    assert seen.count("decode") == 2 + 4, "two do not count"


def test_prefills_that_find_the_step_in_flight_ended_are_counted() -> None:
    """Decode steps take no time at all."""
    fake = CLUSTER.runtime(duration_s=lambda iteration: 5.0 if isinstance(iteration, PrefillIteration) else 0.0)
    runtime = TracedRuntime(fake)
    core = CLUSTER.core(runtime)  # pyright: ignore[reportArgumentType]
    decodes = make_requests("decode", 3, num_tokens=8, max_tokens=500, vocab_size=VOCAB_SIZE)
    begin = measure(core, runtime, 20, decodes, repeats=4)
    assert (begin.lead_ms, begin.num_late) == (0.0, 4)


def test_decodes_that_end_too_soon_are_told() -> None:
    runtime = TracedRuntime(CLUSTER.runtime())
    decodes = make_requests("decode", 3, num_tokens=8, max_tokens=20, vocab_size=VOCAB_SIZE)
    with pytest.raises(AssertionError, match="all the time"):
        measure(CLUSTER.core(runtime), runtime, 20, decodes, repeats=4)  # pyright: ignore[reportArgumentType]


def test_a_real_runtime_is_measured(tmp_path: pathlib.Path) -> None:
    out = tmp_path / "begin.json"
    arguments = ["--shape", "tiny", "--lengths", "16", "100", "--decodes", "2", "--keys", "24", "--num-slots", "4096"]
    assert main([*arguments, "--repeats", "2", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert [row["num_tokens"] for row in report["rows"]] == [16, 100]
    assert all(row[name] > 0.0 for row in report["rows"] for name in ("in_a_row_ms", "alone_ms", "beside_decode_ms"))
    assert report["command"].endswith("--repeats 2 --out " + str(out))
    assert report["shape"] == "tiny"
