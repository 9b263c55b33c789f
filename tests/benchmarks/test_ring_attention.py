"""The benchmark of ring attention runs on virtual CPU devices, and counts what it says it counts."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import ring_attention as benchmark
from benchmarks.ring_attention import Case, cases_of, expected_rows, main, make_program, make_state, mesh_of
from tests.pallas_kernels.brute_force import attend_row

TINY = ["--lengths", "24", "--heads", "4/2", "--head-dim", "16", "--ranks", "2", "--samples", "1"]


def tiny(variant: str, ranks: int) -> Case:
    return Case(length=24, num_q_heads=4, num_kv_heads=2, head_dim=16, ranks=ranks, variant=variant)


@pytest.fixture(autouse=True)
def few_repeats(monkeypatch):
    monkeypatch.setattr(Case, "repeats", 2)


def test_every_variant_gets_a_row_with_its_rate_beside_one_gpu(tmp_path, capsys):
    out = tmp_path / "results" / "ring.json"
    variants = ["apart", "ring", "all_gather", "loop+peer", "permute"]
    main([*TINY, "--variants", *variants, "--out", str(out), "--commit", "abc"])
    result = json.loads(out.read_text())
    assert (result["commit"], result["jax"], result["hardware"]) == ("abc", jax.__version__, "8 x cpu")
    assert result["command"].startswith("python -m benchmarks.ring_attention --lengths 24")
    rows = result["rows"]
    assert [(row["variant"], row["length"], row["ranks"]) for row in rows] == [
        ("one_gpu", 24, 1),
        ("one_gpu", 12, 1),
        *((variant, 24, 2) for variant in variants),
    ]
    assert len(capsys.readouterr().out.splitlines()) == len(rows)
    for row in rows[:-1]:
        assert row["difference"] < 2e-2
        assert row["repeats"] == 2
        assert row["tflops_a_gpu"] * 1e12 * row["seconds"] == pytest.approx(
            sum(range(row["length"] + 1)) * 4 * 4 * 16 / (1 if row["variant"] == "apart" else row["ranks"])
        )
    for row in rows[1:-1]:
        assert row["of_one_gpu"] == pytest.approx(row["tflops_a_gpu"] / rows[0]["tflops_a_gpu"])
    assert rows[-1]["block_bytes"] == 12 * 2 * 16 * 2 * 2
    assert rows[-1]["gb_per_second"] * 1e9 * rows[-1]["seconds"] == pytest.approx(rows[-1]["block_bytes"])
    assert [row["beside_nothing"] for row in rows] == [0, 0, 0, 1, 1, 1, 1]


def test_a_variant_that_fails_leaves_the_others_their_rows(tmp_path, capsys):
    out = tmp_path / "ring.json"
    main([*TINY, "--variants", "star", "loop+wings", "ring", "--out", str(out)])
    rows = {row["variant"]: row for row in json.loads(out.read_text())["rows"]}
    assert "variant must be None or one of" in rows["star"]["error"]
    assert "wings" in rows["loop+wings"]["error"]
    assert math.isfinite(rows["ring"]["tflops_a_gpu"])
    assert "Traceback" in capsys.readouterr().err


def test_no_length_is_begun_after_the_limit(capsys):
    main([*TINY, "--limit-s", "0"])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "left out: 24 tokens, 4/2 heads, 2 ranks\n"


def test_flops_count_visible_pairs_of_one_rank():
    case = Case(length=8, num_q_heads=6, num_kv_heads=2, head_dim=32, ranks=4, variant="ring")
    pairs = sum(key <= row for row in range(8) for key in range(8))
    assert case.flops == pairs // 4 * 6 * 2 * (2 * 32)


def test_one_gpu_has_the_whole_prompt_and_one_ranks_share():
    whole, share, ring = cases_of(64, "8/1", 4, 128, ["ring"])
    assert [(case.length, case.ranks) for case in (whole, share, ring)] == [(64, 1), (16, 1), (64, 4)]
    assert ring == dataclasses.replace(whole, ranks=4, variant="ring")


@pytest.mark.parametrize(("variant", "ranks"), [("one_gpu", 1), ("apart", 3), ("ring", 3), ("all_gather", 3)])
def test_no_repetition_changes_its_inputs(variant, ranks):
    case = tiny(variant, ranks)
    state = make_state(case, mesh_of(ranks))
    inputs = [np.array(x) for x in state[:3]]
    results = make_program(case, mesh_of(ranks), None)(*state, jnp.zeros((ranks, case.rows), jnp.int32))
    for before, after in zip(inputs, results[:3], strict=True):
        np.testing.assert_array_equal(np.asarray(after), before)


def test_the_expected_rows_of_a_gpu_by_itself_are_those_of_brute_force():
    case = tiny("apart", 3)
    state = make_state(case, mesh_of(3))
    q, k, v = (np.array(x.astype(jnp.float32)) for x in state[:3])
    expected = expected_rows(case, state)
    for rank in range(3):
        for i, row in enumerate([0, 12, 23]):
            o, _ = attend_row(q[rank, row], k[rank, : row + 1], v[rank, : row + 1])
            np.testing.assert_allclose(expected[rank, i], o[0], rtol=1e-5, atol=1e-5)


def test_the_expected_rows_are_those_of_brute_force():
    case = tiny("ring", 3)
    state = make_state(case, mesh_of(3))
    q, k, v = (np.array(x.astype(jnp.float32)) for x in state[:3])
    expected = expected_rows(case, state)
    packed_k, packed_v = (x.swapaxes(0, 1).reshape(24, 2, 16) for x in (k, v))
    for rank in range(3):
        for i, row in enumerate([0, 4, 7]):
            token = row * 3 + rank
            o, _ = attend_row(q[rank, row], packed_k[: token + 1], packed_v[: token + 1])
            np.testing.assert_allclose(expected[rank, i], o[0], rtol=1e-5, atol=1e-5)


def test_a_gpu_is_measured_with_the_kernel_for_hopper(monkeypatch):
    asked = []

    class Hopper:
        platform, device_kind = "gpu", "NVIDIA H200"

    monkeypatch.setattr(benchmark.jax, "devices", lambda: [Hopper(), Hopper()])
    monkeypatch.setattr(benchmark, "measure_all", lambda cases, implementation, _: asked.append(implementation) or [])
    main(["--lengths", "64", "--heads", "8/1", "--ranks", "2"])
    assert asked == ["mosaic_gpu"]
