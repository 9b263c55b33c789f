"""Cost models of engines that pad to other sizes are pointed out."""

import dataclasses
import logging

import pytest

from loongjax.core.cluster import ClusterShape
from loongjax.costmodel.measurement import Provenance
from loongjax.costmodel.model import FittedModel, StrategyTimes
from loongjax.costmodel.prefill_time import PaperPrefillTime
from loongjax.costmodel.work import Strategy
from loongjax.runtime.buckets import Buckets
from loongjax.runtime.protocol import RuntimeLimits
from loongjax_profiling.padding import buckets_of, warn_of_other_padding
from tests.costmodel.shapes import LLAMA2_7B, decode, refined
from tests.profiling.iteration.scripted_runtime import ScriptedRuntime
from tests.profiling.simulate.systems import RoundModel

OURS = Buckets(num_tokens=(64, 128, 256), num_rows=(1, 4, 16), num_table_entries=999)


def model(token_buckets: tuple[int, ...], row_buckets: tuple[int, ...]) -> FittedModel:
    """Of an engine that pads so."""
    times = StrategyTimes(
        paper_prefill=PaperPrefillTime(constant_s=0.01, per_token_s=1e-5, per_squared_token_s=0.0),
        decode=dataclasses.replace(decode(1), row_buckets=row_buckets),
        refined_prefill=dataclasses.replace(refined(1), token_buckets=token_buckets),
    )
    return FittedModel(provenance=Provenance(hardware="1 x cpu", model=LLAMA2_7B), strategies={Strategy(1): times})


def warnings_of(cost_model, caplog: pytest.LogCaptureFixture) -> str:
    with caplog.at_level(logging.WARNING):
        warn_of_other_padding(cost_model, OURS)
    return caplog.text


def test_a_runtimes_sizes_are_those_of_its_limits():
    limits = RuntimeLimits(max_model_len=512, max_num_batched_tokens=256, max_num_seqs=16, vocab_size=9)
    shape = ClusterShape(num_instances=1, num_pages=7, page_size=4)
    buckets = buckets_of(ScriptedRuntime(shape=shape, limits=limits))
    assert (buckets.num_tokens, buckets.num_rows) == (OURS.num_tokens, OURS.num_rows)


@pytest.mark.parametrize(
    ("token_buckets", "row_buckets"),
    [
        ((64, 128, 256), (1, 4, 16)),
        ((64, 128), (1, 4)),  # measured less far
        ((64, 128, 256, 512), (1, 4, 16, 64)),  # measured farther
        ((), ()),
    ],
)
def test_equal_sizes_are_nothing_to_speak_of(token_buckets, row_buckets, caplog):
    assert warnings_of(model(token_buckets, row_buckets), caplog) == ""


@pytest.mark.parametrize(
    ("token_buckets", "row_buckets", "flag"),
    [
        ((64, 100), (1, 4, 16), "--max-num-batched-tokens"),
        ((64, 256), (1, 4, 16), "--max-num-batched-tokens"),
        ((64, 128, 256), (1, 4, 8), "--max-num-seqs"),
    ],
)
def test_other_sizes_are_told_with_the_flag_that_sets_them(token_buckets, row_buckets, flag, caplog):
    assert f"measure with the same {flag}" in warnings_of(model(token_buckets, row_buckets), caplog)


def test_an_estimate_pads_nothing(caplog):
    assert warnings_of(RoundModel(), caplog) == ""
