"""The estimate against arithmetic by hand for Llama-2-7B on H200."""

import dataclasses

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from loongjax.costmodel.model import CostModel
from loongjax.costmodel.model_shape import ModelShape
from loongjax.costmodel.roofline import DeviceRates, RooflineModel, known_name, known_names
from loongjax.costmodel.work import DecodeTotals, DecodeWork, PrefillTotals, PrefillWork, Strategy
from loongjax.errors import ConfigError
from tests.costmodel.shapes import LLAMA2_7B

LLAMA3_8B = ModelShape(
    hidden_size=4096,
    num_layers=32,
    num_q_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=14336,
    vocab_size=128256,
)
H200 = RooflineModel(rates=DeviceRates.of_device("NVIDIA H200"), model=LLAMA2_7B)
STRATEGIES = [Strategy(sp, tp) for sp in (1, 2, 4) for tp in (1, 2, 4)]


def test_the_weights_of_a_7b_are_13_gigabytes():
    # 32 layers of 4 x 4096^2 + 3 x 4096 x 11008, and 32000 x 4096 for the output
    assert LLAMA2_7B.num_layer_params == 6_476_005_376
    assert LLAMA2_7B.weight_bytes == 2 * (6_476_005_376 + 131_072_000)


def test_a_tokens_keys_and_values_are_512_kib_in_the_7b_and_128_kib_in_the_8b():
    assert LLAMA2_7B.kv_bytes_per_token == 524_288
    assert LLAMA3_8B.kv_bytes_per_token == 131_072
    assert 1_000_000 * LLAMA2_7B.kv_bytes_per_token == pytest.approx(488 * 2**30, rel=1e-3)


@pytest.mark.parametrize(("tp", "device_bytes"), [(1, 131_072), (2, 65_536), (8, 16_384), (16, 16_384)])
def test_a_device_holds_whole_heads(tp, device_bytes):
    assert LLAMA3_8B.device_kv_bytes_per_token(tp) == device_bytes


def test_a_prefill_of_128k_tokens_is_6_point_2_petaflop():
    num_tokens = 131_072
    linear = 2 * 6_476_005_376 * num_tokens
    attention = 4 * 4096 * 32 * num_tokens**2 / 2
    flops = LLAMA2_7B.prefill_flops(PrefillWork(new_lens=(num_tokens,)).totals).item()
    assert flops == linear + attention
    assert flops == pytest.approx(6.2e15, rel=1e-3)
    # 6.3 PFLOP where the output projection is counted for every token, and the rest rounded.
    assert flops + 2 * 131_072_000 * num_tokens == pytest.approx(6.3e15, rel=0.02)


def test_a_long_prefill_takes_its_flops_and_the_launches():
    seconds = H200.prefill_s(Strategy(1), PrefillWork(new_lens=(131_072,)).totals).item()
    assert seconds == pytest.approx(6.2018e15 / 643e12 + 32 * 20e-6, rel=1e-4)


def test_a_short_prefill_takes_as_long_as_reading_the_weights():
    seconds = H200.prefill_s(Strategy(1), PrefillWork(new_lens=(16,)).totals).item()
    assert seconds == pytest.approx(13.214e9 / 4.3e12 + 32 * 20e-6, rel=1e-3)


def test_four_instances_share_the_flops_of_a_long_prefill():
    work = PrefillWork(new_lens=(131_072,)).totals
    ratio = H200.prefill_s(Strategy(1), work) / H200.prefill_s(Strategy(4), work)
    assert 3.5 < ratio.item() <= 4.0


def test_a_tensor_parallel_prefill_pays_for_its_sums():
    # Two sums a layer of 8192 x 4096 x 2 bytes, of which each of 2 devices sends 2 x 1/2.
    work = PrefillWork(new_lens=(8192,)).totals
    compute = LLAMA2_7B.prefill_flops(work).item() / (2 * 643e12)
    sums = 2 * 32 * 8192 * 4096 * 2 / 150e9
    assert H200.prefill_s(Strategy(1, 2), work).item() == pytest.approx(compute + sums + 32 * (20e-6 + 2 * 25e-6))


def test_a_ring_that_moves_longer_than_it_computes_takes_as_long_as_it_moves():
    rates = DeviceRates(
        name="slow links",
        flops_per_s=1e20,
        memory_bytes_per_s=1e20,
        link_bytes_per_s=1e9,
        layer_overhead_s=0.0,
        collective_s=0.0,
    )
    model = RooflineModel(rates=rates, model=LLAMA2_7B)
    # Each of 4 ranks passes 3 blocks of 1000 tokens of 512 KiB.
    seconds = model.prefill_s(Strategy(4), PrefillWork(new_lens=(4000,)).totals).item()
    assert seconds == pytest.approx(3000 * 524_288 / 1e9)


def test_an_extend_reads_the_keys_of_all_its_requests_on_top_of_its_new_tokens():
    # 100 decodes and a chunk of 4096 and 8192 keys of 512 KiB at 4.3 TB/s: 51 ms; 512 x 8192 pairs take 3.4 ms.
    chunk = PrefillWork(new_lens=(512,), past_lens=(8192,))
    extend = PrefillWork(new_lens=(512, *[1] * 100), past_lens=(8192, *[4096] * 100))
    flops = 2 * 6_476_005_376 * 612 + 4 * 4096 * 32 * (512 * 8192 + 100 * 4096 + (512**2 + 100) / 2)
    keys_s = (100 * 4096 + 8192) * 524_288 / 4.3e12
    assert keys_s == pytest.approx(0.0509, rel=1e-3)
    seconds = H200.prefill_s(Strategy(1), extend.totals).item()
    assert seconds == pytest.approx(flops / 643e12 + keys_s + 32 * 20e-6)
    assert seconds > 4 * H200.prefill_s(Strategy(1), chunk.totals).item()


def test_few_tokens_behind_many_read_the_weights_and_then_the_keys_and_compute_with_them():
    # 32 tokens behind 200,000 of 128 KiB each, over 2 instances.
    model = RooflineModel(rates=H200.rates, model=LLAMA3_8B)
    pairs_s = 4 * 4096 * 32 * 32 * 200_000 / 643e12
    keys_s = 200_000 * 131_072 / 4.3e12
    assert (pairs_s, keys_s) == (pytest.approx(5.22e-3, rel=1e-3), pytest.approx(6.10e-3, rel=1e-3))
    strategy = Strategy(2)
    without = model.prefill_s(strategy, PrefillWork(new_lens=(32,)).totals).item()
    seconds = model.prefill_s(strategy, PrefillWork(new_lens=(32,), past_lens=(200_000,)).totals).item()
    assert seconds == pytest.approx(without + (pairs_s + keys_s) / 2)


@settings(deadline=None)
@given(st.integers(1, 140), st.integers(1, 50_000), st.sampled_from([1, 2, 4]))
def test_an_extend_of_decodes_alone_takes_about_as_long_as_the_decode_step(num_rows, context, tp):
    # Up to 149 rows both compute for less long than they read the weights. An extend's pairs are computed after their
    # keys are read: 0.8 ns after 122.
    extend = PrefillWork(new_lens=(1,) * num_rows, past_lens=(context,) * num_rows)
    step = DecodeTotals.of([DecodeWork(rows=(num_rows,), keys=(num_rows * context,))])
    strategy = Strategy(1, tp)
    np.testing.assert_allclose(H200.prefill_s(strategy, extend.totals), H200.decode_s(strategy, step), rtol=1e-2)


def test_a_decode_step_reads_the_weights_and_the_keys_once():
    # 1 x 128K on 4 devices: 0.8 + 4.0 ms, and launches and sums.
    work = DecodeTotals.of([DecodeWork(rows=(1,), keys=(131_072,))])
    rows = 2 * 32 * 2 * 3 / 4 * 4096 * 2 / 150e9
    expected = 13.214e9 / 4 / 4.3e12 + 131_072 * 131_072 / 4.3e12 + rows + 32 * (20e-6 + 2 * 25e-6)
    assert H200.decode_s(Strategy(1, 4), work).item() == pytest.approx(expected, rel=1e-4)
    assert pytest.approx(0.8e-3, rel=0.05) == 13.214e9 / 4 / 4.3e12
    assert pytest.approx(4.0e-3, rel=0.01) == 131_072 * 131_072 / 4.3e12


def test_a_decode_step_of_many_rows_is_bound_by_compute():
    work = DecodeTotals.of([DecodeWork(rows=(4096,), keys=(4096,))])
    compute = 2 * (6_476_005_376 + 131_072_000) * 4096 / 643e12
    expected = compute + 4096 * 524_288 / 4.3e12 + 32 * 20e-6
    assert H200.decode_s(Strategy(1), work).item() == pytest.approx(expected)


def test_more_masters_split_the_rows_and_exchange_them():
    one = DecodeTotals.even(Strategy(4), 4096, 4096, 1)
    four = DecodeTotals.even(Strategy(4), 4096, 4096, 4)
    assert H200.decode_s(Strategy(4), four).item() < H200.decode_s(Strategy(4), one).item()


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_each_device_exchanges_queries_and_partial_results_of_its_own_heads(tp):
    """In bf16 and float32: 6 bytes a dimension, of each row of the group."""
    few, many = H200.decode_s(
        Strategy(2, tp),
        DecodeTotals(
            num_rows=np.array([64.0, 164.0]),
            num_masters=np.array(1.0),
            busiest_rows=np.array(64.0),
            busiest_keys=np.array(1000.0),
        ),
    )
    assert many - few == pytest.approx(100 * 32 * (32 // tp) * 128 * (2 + 4) / 150e9)


def test_a_migration_moves_the_bytes_of_each_devices_heads():
    assert H200.migration_s(0, 2) == 25e-6
    assert H200.migration_s(1000, 2) == pytest.approx(25e-6 + 1000 * 262_144 / 150e9)


@given(st.integers(1, 200_000), st.integers(0, 200_000), st.sampled_from(STRATEGIES))
def test_more_tokens_never_take_less(num_tokens, more, strategy):
    totals = PrefillTotals.of([PrefillWork(new_lens=(n,)) for n in (num_tokens, num_tokens + more)])
    few, many = H200.prefill_s(strategy, totals)
    assert 0.0 < few <= many


@given(st.integers(1, 500), st.integers(1, 10**6), st.integers(0, 10**6), st.sampled_from(STRATEGIES))
def test_more_keys_never_take_less(rows, keys, more, strategy):
    few, many = H200.decode_s(strategy, DecodeTotals.even(strategy, [rows, rows], [keys, keys + more]))
    assert 0.0 < few <= many


def test_the_estimate_says_that_it_is_one():
    assert H200.source == "roofline"
    assert isinstance(H200, CostModel)


def test_known_devices_are_known_by_what_they_call_themselves():
    assert known_names() == ("H200", "H100", "A100", "A800")
    assert known_name("NVIDIA A800-SXM4-80GB") == "A800"
    assert known_name("h200") == "H200"
    assert known_name("NVIDIA L4") is None


def test_an_unknown_device_gets_rates_that_say_so():
    rates = DeviceRates.of_device("cpu")
    assert rates.name == "generic (cpu is not known)"
    assert rates.flops_per_s < DeviceRates.of_device("NVIDIA A800-SXM4-80GB").flops_per_s


@pytest.mark.parametrize("name", ["flops_per_s", "memory_bytes_per_s", "link_bytes_per_s"])
def test_a_device_that_does_nothing_is_refused(name):
    rates = {
        "flops_per_s": 1.0,
        "memory_bytes_per_s": 1.0,
        "link_bytes_per_s": 1.0,
        "layer_overhead_s": 0.0,
        "collective_s": 0.0,
    }
    with pytest.raises(ConfigError, match="above 0"):
        DeviceRates(name="none", **(rates | {name: 0.0}))


@pytest.mark.parametrize("name", ["num_layers", "num_kv_heads", "dtype_bytes"])
def test_a_model_without_size_is_refused(name):
    sizes = {
        "hidden_size": 8,
        "num_layers": 1,
        "num_q_heads": 1,
        "num_kv_heads": 1,
        "head_dim": 8,
        "intermediate_size": 8,
        "vocab_size": 8,
    }
    with pytest.raises(ConfigError, match=name):
        ModelShape(**(sizes | {name: 0}))


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("link_bytes_per_s", [1e8, 1e10, 150e9])
def test_all_degrees_of_parallelism_together_and_single_numbers_take_what_each_batch_takes(tp, link_bytes_per_s):
    """Exactly, also where the ring is the longest: plans do not depend on which way a time was asked for."""
    model = dataclasses.replace(H200, rates=dataclasses.replace(H200.rates, link_bytes_per_s=link_bytes_per_s))
    lens = [1, 70, 999, 20_000, 400_000]
    totals = PrefillTotals.of_sums(lens, [length * length for length in lens])
    together, behind = np.empty((2, 12, len(lens)))
    model.prefills_s(tp, totals, together)
    extends = PrefillTotals.of([PrefillWork(new_lens=(length,), past_lens=(9000,)) for length in lens])
    model.prefills_s(tp, extends, behind)
    for sp, row in enumerate(together, start=1):
        assert row.tolist() == model.prefill_s(Strategy(sp, tp), totals).tolist()
        assert behind[sp - 1].tolist() == model.prefill_s(Strategy(sp, tp), extends).tolist()
        single = [model.prefill_s(Strategy(sp, tp), PrefillTotals.of_batch(n, n * n)) for n in lens]
        assert row.tolist() == single
