"""`loongjax profile kernels --ops exchange ring`: which rows there are, and that they time what they say."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loongjax.errors import ConfigError, EngineError
from loongjax.pallas_kernels.exchange import PeerMemory
from loongjax.parallel.striped import stripe
from loongjax_profiling.command import KernelsCommand
from loongjax_profiling.kernels import mesh, profile
from loongjax_profiling.kernels.case import Case, Row
from loongjax_profiling.kernels.mesh import exchange_cases, exchanges_of, mesh_sizes, on_every_rank, ring_cases
from loongjax_profiling.kernels.profile import possible_ops, select
from loongjax_profiling.kernels.table import format_table, format_target
from tests.pallas_kernels.brute_force import attend_sequences

LOONGJAX = Path(sys.executable).with_name("loongjax")


def test_the_command_stores_rows_of_two_devices_and_what_they_are_compared_with(tmp_path):
    out = tmp_path / "kernels.json"
    command = [LOONGJAX, "profile", "kernels", "--ops", "exchange", "ring", "--only", "2 devices", "--shrink", "4096"]
    finished = subprocess.run(
        [*command, "--num-cpu-devices", "3", "--out", out, "--commit", "abc"],
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    result = json.loads(out.read_text())
    assert result["hardware"] == "2 x cpu"
    rows = {(row["op"], row["work"], row["variant"]): row for row in result["rows"]}
    assert len(rows) == 15
    assert all(work in finished.stdout for _, work, _ in rows)
    assert "share" not in rows["all_reduce", "32 x 4096, 2 devices", "xla"], "what psum is, too"
    exchanged = rows["multi_master", "32 a master, 32 heads, 2 devices", "reference"]
    assert (exchanged["devices"], exchanged["beside"]) == (2, "reduce-scatter")
    assert "share" not in rows["multi_master", "32 a master, 32 heads, 2 devices", "reduce-scatter"]
    ring = rows["ring_attention", "128K causal, 32/8, 2 devices", "blockwise"]
    assert (ring["devices"], ring["beside"]) == (2, "128K causal, 32/8, 1 device")
    assert "devices" not in rows["ring_attention", "128K causal, 32/8, 1 device", "blockwise"]


@pytest.mark.parametrize(("num_devices", "sizes"), [(1, []), (2, [2]), (3, [2]), (4, [2, 4]), (8, [2, 4, 8])])
def test_meshes_of_two_four_and_eight_are_measured_as_far_as_there_are_devices(num_devices, sizes):
    assert mesh_sizes(num_devices) == sizes
    cases = list(exchange_cases(None, num_devices, has_targets=True))
    assert sorted({case.num_devices for case in cases}) == sizes
    rings = list(ring_cases("blockwise", num_devices, 1))
    assert [case.num_devices for case in rings] == [1, *sizes] * 2
    assert [case.baseline is None for case in rings] == [True, *(False for _ in sizes)] * 2


def test_full_sizes_have_the_targets_of_the_project_and_shrunk_ones_none():
    def cases(shrink):
        return [*exchange_cases("triton", 8, has_targets=shrink == 1), *ring_cases("blockwise", 8, shrink)]

    targets = {(case.work, case.variant): format_target(case) for case in cases(1)}
    assert targets["32 x 4096, 4 devices", "triton"] == "<= 10 us"
    assert targets["32 a master, 32 heads, 4 devices", "triton"] == "<= 15 us"
    assert targets["32 x 4096, 4 devices", "psum"] == targets["128 x 4096, 4 devices", "triton"] == ""
    assert targets["32 x 4096, 8 devices", "triton"] == ""
    assert targets["128K causal, 32/32, 4 devices", "blockwise"] == ">= 95%"
    assert targets["128K causal, 32/32, 1 device", "blockwise"] == ""
    assert {format_target(case) for case in cases(2)} == {""}


def test_amounts_are_what_a_rank_sends_and_what_it_computes():
    amounts = {case.work: case.amount for case in exchange_cases(None, 4, has_targets=False)}
    assert amounts["32 x 4096, 2 devices"] == 32 * 4096 * 2
    assert amounts["32 x 4096, 4 devices"] == 3 * 32 * 4096 * 2
    assert amounts["1 a master, 32 heads, 4 devices"] == 3 * 32 * (128 * 2 + 128 * 2 + 8)
    rings = {case.work: case.amount for case in ring_cases("blockwise", 4, 1)}
    assert rings["128K causal, 32/8, 1 device"] == 131072 * 131073 // 2 * 4 * 32 * 128
    assert rings["128K causal, 32/8, 4 devices"] * 4 == rings["128K causal, 32/8, 1 device"]
    shrunk = {case.work: case.amount for case in ring_cases("blockwise", 8, 131072 // 20)}
    assert shrunk["128K causal, 32/8, 8 devices"] * 8 == 16 * 17 // 2 * 4 * 32 * 128, "as many tokens on each"


def test_one_devices_rate_of_a_ring_is_compared_with_that_of_one_device_alone():
    alone, ring, *_ = ring_cases("blockwise", 2, 1)
    rows = [Row(case=alone, seconds=0.1), Row(case=ring, seconds=0.0625)]
    assert format_table(rows, copy_rate=4e12).endswith("80.0% of 128K causal, 32/8, 1 device")
    assert select([alone, ring], "2 devices") == [alone, ring]


def test_an_exchange_is_compared_with_xlas_and_never_with_a_copy():
    ours, rival, *_ = exchange_cases("triton", 2, has_targets=True)
    rows = [Row(case=ours, seconds=1e-5), Row(case=rival, seconds=2e-5)]
    assert format_table(rows, copy_rate=4e12).splitlines()[1].endswith("200.0% of psum")
    assert format_table(rows[:1], copy_rate=4e12).splitlines()[1].endswith("GB/s")


def case_of(cases, op: str, work: str, variant: str) -> Case:
    [found] = [case for case in cases if (case.op, case.work, case.variant) == (op, work, variant)]
    return found


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("variant", ["reference", "xla", "psum"])
def test_two_repetitions_of_an_all_reduce_are_two_sums(variant, size):
    implementation = "reference" if variant == "psum" else variant
    case = case_of(
        exchange_cases(implementation, size, has_targets=False), "all_reduce", f"1 x 4096, {size} devices", variant
    )
    x = np.asarray(mesh._random(0, size, 1, 4096), np.float64)
    factors = np.random.default_rng(0).uniform(0.8, 1.2, size) / size
    factors = np.asarray(jnp.asarray(factors, jnp.bfloat16), np.float64)[:, None, None]
    for _ in range(2):
        x = np.broadcast_to((x * factors).sum(axis=0), x.shape)
    np.testing.assert_allclose(np.asarray(case.build()(2)(), np.float64), x, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("variant", ["reference", "reduce-scatter"])
def test_a_repetition_of_a_multi_master_exchange_merges_every_ranks_outputs(variant, size):
    work = f"32 a master, 32 heads, {size} devices"
    case = case_of(exchange_cases("reference", size, has_targets=False), "multi_master", work, variant)
    q = np.asarray(mesh._random(0, size, 32, 32, 128), np.float64)
    factors = jnp.asarray(np.random.default_rng(0).uniform(0.8, 1.2, size), jnp.bfloat16)
    factors = np.asarray(factors, np.float64)[:, None, None, None]
    merged = np.zeros_like(q)
    for master in range(size):
        # [ranks, B, N, H], as rounded as what stands for attention gives it.
        partial = np.asarray(jnp.asarray(q[master] * factors, jnp.bfloat16), np.float64)
        weights = np.exp(partial[..., :1])
        merged[master] = (partial * weights).sum(axis=0) / weights.sum(axis=0)
    np.testing.assert_allclose(np.asarray(case.build()(1)(), np.float64), merged, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_repetition_of_the_ring_is_causal_attention_of_the_whole_prompt(size):
    length = 32
    work = f"128K causal, 32/8, {size} devices" if size > 1 else "128K causal, 32/8, 1 device"
    case = case_of(ring_cases("blockwise", 4, 131072 // length), "ring_attention", work, "blockwise")
    *_, o = case.build()(1)()
    found = np.asarray(o, np.float64)
    shapes = [(size, length // size, heads, 128) for heads in (32, 8, 8)]
    packed = [np.asarray(mesh._random(seed, *shape), np.float64) for seed, shape in enumerate(shapes)]
    q, k, v = (x.swapaxes(0, 1).reshape(length, *x.shape[2:]) for x in packed)
    np.testing.assert_array_equal(stripe(q, size, fill=0), packed[0])
    expected, _ = attend_sequences(q, k, v, [length])
    np.testing.assert_allclose(found.swapaxes(0, 1).reshape(expected.shape), expected, rtol=0.03, atol=0.03)


@pytest.mark.parametrize(("op", "num_kernels"), [("all_reduce", 1), ("multi_master", 2)])
def test_exchanges_by_kernels_lower_for_gpus(op, num_kernels):
    exchange = [exchange for exchange in exchanges_of(2) if exchange.op == op][-1]
    step = on_every_rank(exchange.step("triton"), mesh._mesh(2))
    shapes = ((2, 3), "uint32"), ((2, *exchange.shape), "bfloat16"), ((2,), "bfloat16")
    checks = [jax.export.DisabledSafetyCheck.custom_call("triton_kernel_call_ffi")]
    export = jax.export.export(jax.jit(step), platforms=["cuda"], disabled_checks=checks)
    module = export(*(jax.ShapeDtypeStruct(*shape) for shape in shapes)).mlir_module()
    assert module.count("custom_call @triton_kernel_call_ffi") == num_kernels


def test_ops_of_meshes_are_left_out_where_there_is_one_device(monkeypatch, capsys):
    assert possible_ops(["ring", "decode", "decode"], 1) == ["decode"]
    assert possible_ops(["ring", "decode"], 2) == ["ring", "decode"]
    with pytest.raises(ConfigError, match="--ops exchange ring: that takes two devices or more"):
        possible_ops(["exchange", "ring"], 1)
    one_device = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: one_device)
    monkeypatch.setattr(profile, "measure", lambda cases: iter(()))
    monkeypatch.setattr(profile, "copy_bytes_per_second", lambda num_bytes: 4e12)
    assert profile.profile_kernels(KernelsCommand(ops=("decode", "exchange"), only="1 x 1K")) == 0
    assert "left out, since there is one device and they need two: exchange" in capsys.readouterr().err


def test_a_variant_that_exchanges_do_not_have_is_refused():
    with pytest.raises(ConfigError, match="exchange has reference, triton"):
        profile.profile_kernels(KernelsCommand(ops=("exchange",), implementation="xla"))


def test_every_repetition_of_the_ring_attends_and_sends_its_keys(monkeypatch):
    made = {}

    def record(step, operands, carried, **settings):
        made.update(step=step, operands=operands, carried=carried, settings=settings)
        return lambda num: None

    monkeypatch.setattr(mesh, "repeat_step", record)
    mesh._ring("blockwise", 64, (2, 1), 2)
    assert made["settings"]["as_loop"]

    @jax.jit
    def run(operands, carried):
        return jax.lax.fori_loop(0, 3, lambda i, carried: made["step"](operands, carried, i), carried)

    text = run.lower(made["operands"], made["carried"]).compile().as_text()
    assert text is not None
    entry = text[text.index("\nENTRY ") :]
    assert "collective-permute(" in text
    assert "collective-permute(" not in entry
    assert entry.count(" while(") == 1, "nothing attends before the repetitions begin"


def test_times_of_exchanges_that_gave_up_are_not_believed(monkeypatch, tmp_path):
    memory = object.__new__(PeerMemory)
    decode, exchange = make_cases()
    monkeypatch.setattr(profile, "copy_bytes_per_second", lambda num_bytes: 4e12)
    monkeypatch.setattr(profile, "measure", lambda cases: (Row(case=case, seconds=1e-5) for case in (decode, exchange)))
    monkeypatch.setattr(PeerMemory, "check", lambda self: (_ for _ in ()).throw(EngineError("gave up waiting")))
    monkeypatch.setattr(mesh, "PeerMemory", lambda devices: memory)
    out = tmp_path / "kernels.json"
    command = KernelsCommand(ops=("exchange",), only="2 devices", out=out)
    mesh.peer_memory.cache_clear()
    try:
        assert profile.profile_kernels(command) == 0, "nobody has exchanged anything"
        assert mesh.peer_memory() is memory
        assert profile.profile_kernels(command) == 1
    finally:
        mesh.peer_memory.cache_clear()
    believed, void = json.loads(out.read_text())["rows"]
    assert "error" not in believed
    assert void["error"] == "gave up waiting"
    assert "seconds" not in void


def make_cases() -> tuple[Case, Case]:
    exchange, *_ = exchange_cases("triton", 2, has_targets=True)
    return dataclasses.replace(exchange, op="decode_attention", num_devices=1), exchange
