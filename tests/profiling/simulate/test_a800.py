"""The coefficients against the published times that they were derived from."""

import numpy as np
import pytest

from loongjax.costmodel.work import DecodeTotals, DecodeWork, PrefillWork, Strategy
from loongjax_profiling.simulate.a800 import a800_model

MODEL = a800_model()
BATCHES = ((512, 1_000), (128, 5_000), (64, 10_000), (16, 50_000), (4, 100_000), (1, 500_000))
TP8 = Strategy(1, 8)
SP4TP2 = Strategy(4, 2)


def prefill_ms(strategy: Strategy, num_requests: int, prompt_len: int) -> float:
    work = PrefillWork(new_lens=(prompt_len,) * num_requests)
    return 1000.0 * MODEL.prefill_s(strategy, work.totals).item()


def decode_ms(strategy: Strategy, num_requests: int, prompt_len: int, num_masters: int = 1) -> float:
    rows = tuple(len(part) for part in np.array_split(np.arange(num_requests), num_masters))
    keys = (num_requests * prompt_len // strategy.sp,) * strategy.sp
    return 1000.0 * MODEL.decode_s(strategy, DecodeTotals.of([DecodeWork(rows=rows, keys=keys)])).item()


@pytest.mark.parametrize(
    ("strategy", "measured_ms"),
    [(SP4TP2, (5267, 7072, 7701, 15744, 11798, 53606)), (TP8, (7757, 10157, 10792, 19506, 13546, 51135))],
)
def test_prefills_of_figure_3_are_met_within_fifteen_percent(strategy: Strategy, measured_ms: tuple[float, ...]):
    predicted = [prefill_ms(strategy, *batch) for batch in BATCHES]
    assert predicted == pytest.approx(measured_ms, rel=0.15)


def test_decodes_of_figure_3_are_met_within_fifteen_percent():
    masters = (4, 2, 2, 1, 1, 1)
    predicted = [decode_ms(SP4TP2, *batch, count) for batch, count in zip(BATCHES, masters, strict=True)]
    assert predicted == pytest.approx((42.3, 41.4, 40.1, 45.9, 28.9, 37.8), rel=0.17)
    assert [decode_ms(TP8, *batch) for batch in BATCHES] == pytest.approx((38.9, 37.8, 36.4, 42.9, 26.4, 37.6), rel=0.2)


def test_a_prompt_of_100k_tokens_scales_over_tensor_parallelism_as_in_figure_2():
    one_gpu_ms = 1000.0 * (0.0186 + 5.03e-5 * 1e5 + 8 * 1.93e-10 * 1e10)
    assert prefill_ms(Strategy(1, 2), 1, 100_000) / one_gpu_ms == pytest.approx(0.52, rel=0.05)
    assert prefill_ms(TP8, 1, 100_000) / one_gpu_ms == pytest.approx(0.165, rel=0.05)
    assert prefill_ms(TP8, 1, 100_000) / prefill_ms(TP8, 1, 1_000) == pytest.approx(105.97, rel=0.05)


def test_more_masters_speed_a_large_batch_up_as_in_figure_13():
    one, two, four = (decode_ms(SP4TP2, 1024, 10, count) for count in (1, 2, 4))
    assert (two / one, four / one) == pytest.approx((0.63, 0.46), rel=0.1)


def test_a_small_prompt_takes_what_the_artifact_measured():
    assert 32.8 <= prefill_ms(SP4TP2, 1, 100) <= 38.5
    assert 9.76 <= decode_ms(SP4TP2, 1, 100) <= 12.4


def test_larger_groups_are_extrapolated_only_if_asked_for():
    assert Strategy(16, 2) in a800_model(16).strategies
    assert Strategy(5, 2) not in MODEL.strategies
