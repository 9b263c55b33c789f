"""`loongjax profile kernels`: which rows there are, what they count, and what is printed and stored."""

import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from loongjax.errors import ConfigError
from loongjax_profiling.command import KernelsCommand, main
from loongjax_profiling.kernels import profile
from loongjax_profiling.kernels.case import Case, Row
from loongjax_profiling.kernels.dense import causal, prefill_cases, ring_step, zipf_lengths
from loongjax_profiling.kernels.paged import chain, decode_cases, extend_cases
from loongjax_profiling.kernels.table import format_table, measure, to_json

LOONGJAX = Path(sys.executable).with_name("loongjax")


def test_the_command_prints_and_stores_a_row_for_each_page_size(tmp_path):
    out = tmp_path / "results" / "kernels.json"
    command = [LOONGJAX, "profile", "kernels", "--ops", "decode", "--only", "1 x 1K", "--out", out, "--commit", "abc"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    result = json.loads(out.read_text())
    assert (result["commit"], result["hardware"]) == ("abc", "1 x cpu")
    assert [row["work"].split(", ")[-1] for row in result["rows"]] == ["page size 16", "page size 64", "page size 1"]
    for row in result["rows"]:
        assert row["work"] in finished.stdout
        assert row["rate"] * row["seconds"] == pytest.approx(4 * 8 * 128 * 2 * 2)  # 1K by 256, K and V, bfloat16


@pytest.mark.parametrize("argv", [[], ["nothing"], ["--only", "x"]])
def test_a_wrong_sub_command_is_answered_with_the_usage(argv, capsys):
    assert main(argv) == 2
    assert "usage: loongjax profile kernels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"only": "no such work"}, "leaves nothing"),
        ({"implementation": "cudnn"}, "decode has blockwise, reference, triton"),
        ({"shrink": 0}, "at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        profile.profile_kernels(KernelsCommand(**settings))


def test_decode_reads_every_key_and_value_once():
    amounts = {case.work: case.amount for case in decode_cases("blockwise", 1)}
    assert amounts["32 x 16K, 32/8, page size 16"] == 32 * 16384 * 8 * 128 * 2 * 2
    assert amounts["8 x 16K, 32/32, page size 1"] == 8 * 16384 * 32 * 128 * 2 * 2
    assert len(amounts) == 18


def test_operations_are_those_of_visible_pairs():
    amounts = {(case.work, case.variant): case.amount for case in prefill_cases("blockwise", 1, with_cudnn=True)}
    per_pair = 4 * 32 * 128
    assert amounts["4K full, 32/8", "blockwise"] == 4096**2 * per_pair
    assert amounts["4K causal, 32/8", "blockwise"] == 4096 * 4097 // 2 * per_pair
    assert amounts["packed 64 x 1K, 32/8", "blockwise"] == 64 * 1024 * 1025 // 2 * per_pair
    assert all(
        amounts[work, "blockwise"] == amount for (work, variant), amount in amounts.items() if variant == "cudnn"
    )
    [extend] = [case for case in extend_cases("blockwise", 1) if case.work == "512 on 32K, 32/8, page size 16"]
    assert extend.amount == 512 * 32768 * per_pair


def test_a_ring_step_sees_what_comes_before_in_the_striped_layout():
    k_start, k_end = ring_step([15], 3)
    for row in range(5):
        seen = [key for key in range(5) if key * 3 + 1 <= row * 3]
        assert list(range(k_start[row], k_end[row])) == seen


@pytest.mark.parametrize("num_tokens", [1, 7, 1000, 65536])
def test_zipf_prompts_fill_the_batch(num_tokens):
    lengths = zipf_lengths(num_tokens)
    assert sum(lengths) == num_tokens
    assert min(lengths) >= 1
    starts, ends = causal(lengths)
    assert len(starts) == num_tokens
    assert (ends > starts).all()


def test_repetitions_depend_on_each_other():
    repeat = chain(lambda keys, q: q * keys, jnp.float32(2.0), jnp.ones(3))
    np.testing.assert_array_equal(repeat(5)(), np.full(3, 32.0, np.float32))


def test_a_case_that_fails_is_a_row_that_says_why_and_the_rest_goes_on():
    def broken():
        raise RuntimeError("no such kernel")

    def case(work, build):
        return Case(op="op", work=work, variant="v", amount=1e9, unit="FLOP", build=build)

    def works():
        return chain(lambda keys, q: jnp.tanh(q @ keys), jnp.ones((300, 300)), jnp.ones((300, 300)))

    failed, measured = measure([case("a", broken), case("b", works)])
    assert failed.error == "RuntimeError: no such kernel"
    assert measured.error is None or measured.error == "too short to be timed"


def test_the_table_compares_bytes_with_a_copy_and_operations_with_cudnn():
    rows = [
        Row(op="decode_attention", work="d", variant="triton", unit="B", seconds=1e-3, rate=3e12),
        Row(op="prefill_attention", work="p", variant="mosaic_gpu", unit="FLOP", seconds=1e-3, rate=6e14),
        Row(op="prefill_attention", work="p", variant="cudnn", unit="FLOP", seconds=1e-3, rate=5e14),
        Row(op="prefill_attention", work="q", variant="mosaic_gpu", unit="FLOP", error="ValueError: no"),
    ]
    lines = format_table(rows, copy_rate=4e12).splitlines()
    assert lines[1].endswith("3.00 TB/s  75.0% of a copy")
    assert lines[2].endswith("600.00 TFLOP/s  120.0% of cudnn")
    assert lines[3].endswith("500.00 TFLOP/s")
    assert lines[4].endswith("ValueError: no")
    stored = json.loads(to_json({"commit": None}, rows))
    assert stored["rows"][3] == {
        "op": "prefill_attention",
        "work": "q",
        "variant": "mosaic_gpu",
        "unit": "FLOP",
        "error": "ValueError: no",
    }
