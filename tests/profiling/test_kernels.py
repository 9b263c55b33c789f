"""`loongjax profile kernels`: which rows there are, what they count, and what is printed and stored."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loongjax.errors import ConfigError
from loongjax.pallas_kernels.extend_attention import api as extend_api
from loongjax_profiling.command import KernelsCommand, main
from loongjax_profiling.kernels import profile
from loongjax_profiling.kernels.case import Case, Row
from loongjax_profiling.kernels.chain import chain, repeat_step
from loongjax_profiling.kernels.dense import causal, prefill_cases, ring_step, zipf_lengths
from loongjax_profiling.kernels.paged import decode_cases, extend_cases, update_cases
from loongjax_profiling.kernels.profile import select
from loongjax_profiling.kernels.table import format_table, format_target, measure, to_json
from loongjax_profiling.kernels.timing import LEAST_SAMPLES, SlopeTimer, sample_in_turn

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


def test_ctrl_c_keeps_the_rows_measured_by_then(tmp_path, monkeypatch, capsys):
    def interrupted(cases):
        yield Row(case=cases[0], seconds=1e-3, method="slope")
        raise KeyboardInterrupt

    monkeypatch.setattr(profile, "measure", interrupted)
    out = tmp_path / "kernels.json"
    with pytest.raises(KeyboardInterrupt):
        profile.profile_kernels(KernelsCommand(ops=("decode",), only="1 x 1K", out=out))
    assert len(json.loads(out.read_text())["rows"]) == 1
    printed = capsys.readouterr()
    assert "1 x 1K" in printed.out
    assert "ended by Ctrl-C after 1 of 3 rows" in printed.err


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


def test_an_empty_list_of_ops_is_refused_by_name():
    with pytest.raises(ConfigError, match="--ops names no op: give one or more of decode, extend, kv_update, prefill"):
        KernelsCommand(ops=())


def test_decode_reads_every_key_and_value_once():
    amounts = {case.work: case.amount for case in decode_cases("blockwise", 1)}
    assert amounts["32 x 16K, 32/8, page size 16"] == 32 * 16384 * 8 * 128 * 2 * 2
    assert amounts["8 x 16K, 32/32, page size 1"] == 8 * 16384 * 32 * 128 * 2 * 2
    assert len(amounts) == 18


def test_an_update_reads_its_tokens_and_writes_them():
    amounts = {case.work: case.amount for case in update_cases("reference", 1)}
    assert amounts["32 tokens, 8 KV heads, page size 16"] == 2 * (2 * 32 * 8 * 128) * 2


def fake_rival(q, k, v, *, is_causal):
    return q, q


def test_operations_are_those_of_visible_pairs():
    cases = list(prefill_cases("blockwise", 1, {"rival": fake_rival}))
    amounts = {(case.work, case.variant): case.amount for case in cases}
    per_pair = 4 * 32 * 128
    assert amounts["4K full, 32/8", "blockwise"] == 4096**2 * per_pair
    assert amounts["4K causal, 32/8", "blockwise"] == 4096 * 4097 // 2 * per_pair
    assert amounts["packed 64 x 1K, 32/8", "blockwise"] == 64 * 1024 * 1025 // 2 * per_pair
    assert amounts["ring step of DoP 4, 16K a rank, 32/8", "blockwise"] == 16384 * 16383 // 2 * per_pair
    assert all(
        amounts[work, "blockwise"] == amount for (work, variant), amount in amounts.items() if variant == "rival"
    )
    assert {case.is_rival for case in cases if case.variant == "rival"} == {True}
    [extend] = [
        case
        for case in extend_cases("blockwise", 1, prefill_variant="reference")
        if case.work == "512 on 32K, 32/8, page size 16"
    ]
    assert extend.amount == 512 * 32768 * per_pair


def test_full_lengths_have_the_targets_of_the_project_and_shrunk_ones_none():
    def cases(shrink):
        return [
            *decode_cases("blockwise", shrink),
            *extend_cases("blockwise", shrink, prefill_variant="blockwise"),
            *prefill_cases("blockwise", shrink, {}),
        ]

    targets = {case.work: format_target(case) for case in cases(1)}
    assert targets["16K full, 8/1"] == ">= 100%"
    assert targets["packed Zipf mix of 64K, 32/8"] == ">= 90%"
    assert targets["ring step of DoP 8, 16K a rank, 32/8"] == ">= 90%"
    assert targets["32 x 16K, 32/8, page size 64"] == ">= 92%"
    assert targets["32 x 16K, 32/8, page size 1"] == ">= 88%"
    assert targets["1 x 1K, 32/8, page size 16"] == "<= 12 us"
    assert targets["512 on 128K, 32/8, page size 1"] == ">= 80%"
    assert targets["4 on 128K, 32/8, page size 1"] == ""
    assert {format_target(case) for case in cases(256)} == {""}


def test_every_extension_is_timed_in_the_variant_that_it_takes_by_itself(monkeypatch):
    def default_variant(*where, page_size, num_rows, num_requests):
        return f"pages of {page_size}, {num_rows} rows of {num_requests}"

    monkeypatch.setattr(extend_api, "default_variant", default_variant)
    cases = extend_cases(None, 1, prefill_variant="reference")
    variants = {case.work: case.variant for case in cases}
    assert variants["512 on 32K, 32/8, page size 16"] == "pages of 16, 512 rows of 1"
    assert variants["512 on 32K, 32/8, page size 1"] == "pages of 1, 512 rows of 1"
    assert variants["4 on 128K, 32/8, page size 16"] == "pages of 16, 4 rows of 1"
    assert variants["4 on 128K, 32/8, no pages"] == "prefill reference"


def test_what_is_compared_with_a_baseline_brings_it_along():
    cases = [
        *prefill_cases("blockwise", 1, {}),
        *extend_cases("triton", 1, prefill_variant="blockwise"),
        *decode_cases("triton", 1),
    ]
    works = {case.work for case in select(cases, "Zipf mix of 64K")}
    assert works == {"64K causal, 32/8", "packed Zipf mix of 64K, 32/8"}
    extensions = {(case.work, case.variant) for case in select(cases, "512 on 32K, 32/8, page size 1")}
    assert ("512 on 32K, 32/8, no pages", "prefill blockwise") in extensions
    assert select(cases, "no such work") == []


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
    repeat = chain(lambda keys, q, i: q * keys + i, jnp.float32(2.0), jnp.ones(3))
    np.testing.assert_array_equal(repeat(3)(), np.full(3, ((1 * 2 + 0) * 2 + 1) * 2 + 2, np.float32))


def test_a_call_goes_on_in_the_memory_of_the_one_before_and_leaves_what_was_given_alone():
    given = jnp.zeros(1 << 16)
    call = repeat_step(lambda operands, carried, i: carried + operands, jnp.float32(1), given)(3)
    places = set()
    for total in (3.0, 6.0, 9.0):
        carried = call()
        np.testing.assert_array_equal(carried, np.full(1 << 16, total, np.float32))
        places.add(carried.unsafe_buffer_pointer())
    assert len(places) == 1
    np.testing.assert_array_equal(given, np.zeros(1 << 16, np.float32))


def test_repetitions_that_keep_their_queries_run_one_after_another_on_the_same():
    calls = []

    def attend(keys, q, i):
        jax.debug.callback(lambda i, q: calls.append((int(i), q.tolist())), i, q, ordered=True)
        return q * 1000.0 + i

    repeat = chain(attend, None, jnp.ones((1, 2)), keeps_queries=True)
    assert float(repeat(3)()) == 1002.0 + 1001.0 / 2 + 1000.0 / 4
    jax.effects_barrier()
    assert calls == [(i, [[1.0, 1.0]]) for i in range(3)]


def test_a_case_that_fails_is_a_row_that_says_why_and_the_rest_goes_on():
    def broken():
        raise RuntimeError("no such kernel")

    def works():
        return chain(lambda keys, q, i: jnp.tanh(q @ keys), jnp.ones((300, 300)), jnp.ones((300, 300)))

    failed, measured = measure([make_case(work="a", build=broken), make_case(work="b", build=works)])
    assert failed.error == "RuntimeError: no such kernel"
    assert (measured.error, measured.method) in ((None, "slope"), ("too short to be timed", None))


def test_a_case_whose_program_cannot_be_compiled_is_a_row_that_says_why_too():
    def unfit():
        return chain(lambda keys, q, i: jnp.reshape(q, (5,)), None, jnp.ones(3))

    failed, _ = measure([make_case(work="a", build=unfit), make_case(work="b")])
    assert failed.error is not None
    assert failed.error.startswith("TypeError: cannot reshape")


def test_variants_of_the_same_work_keep_their_order_beside_one_that_fails():
    def broken():
        raise RuntimeError("no such kernel")

    def works():
        return chain(lambda keys, q, i: jnp.tanh(q @ keys), jnp.ones((300, 300)), jnp.ones((300, 300)))

    cases = [make_case(variant=name, build=broken if name == "b" else works) for name in "abc"]
    rows = list(measure([*cases, make_case(work="other", build=works)]))
    assert [(row.case.work, row.case.variant) for row in rows] == [
        ("p", "a"),
        ("p", "b"),
        ("p", "c"),
        ("other", "ours"),
    ]
    assert rows[1].error == "RuntimeError: no such kernel"


def test_timers_in_turn_give_as_many_slopes_each_in_another_order_every_round():
    calls = []

    def repeat(name):
        def make(num):
            def call():
                calls.append((name, num))
                return jnp.zeros(1)

            return call

        return make

    timers = [SlopeTimer(repeat(name), 3) for name in "abc"]
    assert calls == [(name, 3) for name in "abc"]
    calls.clear()
    sample_in_turn(timers, 6)
    # Four calls of each in a round: three, and one.
    rounds = ["".join(name for name, _ in calls[i : i + 12 : 4]) for i in range(0, len(calls), 12)]
    assert len(rounds) == 6
    assert {"".join(sorted(order)) for order in rounds} == {"abc"}
    assert len(set(rounds)) > 1
    calls.clear()
    sample_in_turn(timers, 6, enough_s=0.0)
    assert len(calls) == LEAST_SAMPLES * 3 * 4


def make_case(**settings) -> Case:
    defaults = {"op": "prefill_attention", "work": "p", "variant": "ours", "amount": 1e12, "unit": "FLOP"}
    return Case(**{**defaults, "build": lambda: chain(lambda keys, q, i: q, None, jnp.ones(1)), **settings})


def test_operations_are_compared_with_the_fastest_rival_at_the_same_work_before_any_baseline():
    rows = [
        Row(case=make_case(baseline=("base", "ours"), least_share=1.0), seconds=1e-3),
        Row(case=make_case(variant="slow", is_rival=True), seconds=4e-3),
        Row(case=make_case(variant="fast", is_rival=True), seconds=2e-3),
        Row(case=make_case(variant="broken", is_rival=True), error="ValueError: no"),
        Row(case=make_case(work="q", baseline=("base", "ours"), least_share=0.9), seconds=4e-3),
        Row(case=make_case(work="base"), seconds=2e-3),
        Row(case=make_case(work="base", variant="other"), seconds=1e-3),
    ]
    lines = format_table(rows, copy_rate=4e12).splitlines()[1:]
    assert lines[0].endswith("1000.00 TFLOP/s  >= 100%     200.0% of fast")
    assert lines[2].endswith("500.00 TFLOP/s")
    assert lines[3].endswith("ValueError: no")
    assert lines[4].endswith("250.00 TFLOP/s  >= 90%      50.0% of base")
    assert lines[5].endswith("500.00 TFLOP/s")


def test_bytes_are_compared_with_a_copy():
    row = Row(case=make_case(unit="B", amount=3e9, most_seconds=12e-6), seconds=1e-3, method="slope")
    assert format_table([row], copy_rate=4e12).endswith("1000.0 us       3.00 TB/s  <= 12 us    75.0% of a copy")


def test_the_file_holds_the_comparison_and_what_is_known_of_a_row():
    rows = [
        Row(case=make_case(unit="B", amount=3e9, least_share=0.9), seconds=1e-3, method="slope"),
        Row(case=make_case(), error="ValueError: no"),
    ]
    stored = json.loads(to_json({"commit": None}, rows, copy_rate=4e12))
    names = {"op": "prefill_attention", "work": "p", "variant": "ours"}
    assert stored["rows"] == [
        {
            **names,
            "unit": "B",
            "seconds": 1e-3,
            "method": "slope",
            "rate": 3e12,
            "target": 0.9,
            "share": 0.75,
            "beside": "a copy",
        },
        {**names, "unit": "FLOP", "error": "ValueError: no"},
    ]
