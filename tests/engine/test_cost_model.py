"""Which times of iterations an engine reckons with, and which files it refuses."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pytest

from loongjax.core.cluster import ClusterShape
from loongjax.costmodel.fit import fit
from loongjax.costmodel.model import FittedModel
from loongjax.costmodel.model_file import save
from loongjax.costmodel.roofline import RooflineModel
from loongjax.costmodel.work import DecodeTotals, DecodeWork, PrefillTotals, Strategy
from loongjax.engine.cost_model import cost_shape, resolve_cost_model
from loongjax.errors import ConfigError
from loongjax.models.config import ModelConfig
from loongjax.runtime.buckets import Buckets
from loongjax.runtime.model_spec import ModelSpec
from tests.costmodel.shapes import LLAMA2_7B, measurements

TWO = ClusterShape(num_instances=2, num_pages=100, page_size=16)
BUCKETS = Buckets.for_limits(max_num_batched_tokens=8192, max_num_seqs=64, num_pages=100)
LLAMA2 = ModelConfig(
    hidden_size=4096,
    num_layers=32,
    num_q_heads=32,
    num_kv_heads=32,
    head_dim=128,
    intermediate_size=11008,
    vocab_size=32000,
)


@pytest.fixture(scope="module")
def fitted() -> FittedModel:
    """One of a 7B on up to two H200."""
    return fit(measurements((Strategy(1), Strategy(2))))


@pytest.fixture
def path(fitted: FittedModel, tmp_path: Path) -> str:
    save(fitted, tmp_path / "model.json")
    return str(tmp_path / "model.json")


def resolve(path: str | None, **changes: object) -> object:
    usual = {"model": LLAMA2_7B, "cluster": TWO, "buckets": BUCKETS, "device_kind": "NVIDIA H200"}
    return resolve_cost_model(path, **(usual | changes))  # pyright: ignore[reportArgumentType]


def test_without_a_file_there_is_an_estimate_and_the_log_says_so(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, logger="loongjax"):
        model = resolve(None)
    assert isinstance(model, RooflineModel)
    assert (model.rates.name, model.model) == ("NVIDIA H200", LLAMA2_7B)
    assert "a roofline estimate for NVIDIA H200; --cost-model FILE gives measured times" in caplog.text


def test_a_device_that_is_not_known_is_told(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, logger="loongjax"):
        resolve(None, device_kind="cpu")
    assert "generic (cpu is not known)" in caplog.text


def test_a_file_is_read_and_the_log_says_where_it_is_from(
    path: str, fitted: FittedModel, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.INFO, logger="loongjax"):
        model = resolve(path)
    assert isinstance(model, FittedModel)
    totals = PrefillTotals.of_sums(100, 10_000)  # which is 64 tokens on each of two ranks here as there
    assert model.prefill_s(Strategy(2), totals) == fitted.prefill_s(Strategy(2), totals)
    assert f"cost model: {path}, fitted on 4 x NVIDIA H200 at commit 0123abc" in caplog.text
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


def test_a_file_is_told_to_which_sizes_this_engine_pads(path: str, fitted: FittedModel):
    """Of 5,000 tokens it computes 5,120; where the model was measured, 16,384 were computed."""
    model = resolve(path)
    assert isinstance(model, FittedModel)
    long = PrefillTotals.of_sums(5_000, 25_000_000)
    saved_s = fitted.prefill_s(Strategy(1), long) - model.prefill_s(Strategy(1), long)
    per_token_s = fitted.times(Strategy(1)).prefill.per_padded_token_s  # pyright: ignore[reportAttributeAccessIssue]
    assert saved_s == pytest.approx((16_384 - 5_120) * per_token_s)
    rows = DecodeTotals.of([DecodeWork(rows=(65,), keys=(6_500,))])
    assert model.decode_s(Strategy(1), rows) == pytest.approx(fitted.decode_s(Strategy(1), rows))
    assert model.times(Strategy(1)).decode.row_buckets == BUCKETS.num_rows


def test_a_file_from_other_hardware_is_warned_about(path: str, caplog: pytest.LogCaptureFixture):
    resolve(path, device_kind="NVIDIA A100-SXM4-80GB")
    assert "was fitted on 4 x NVIDIA H200, and this is NVIDIA A100-SXM4-80GB" in caplog.text


def test_a_file_for_another_model_is_refused_with_what_differs(path: str):
    served = dataclasses.replace(LLAMA2_7B, num_kv_heads=8, dtype_bytes=4)
    with pytest.raises(ConfigError, match=r"another model, with num_kv_heads 32 instead of 8, dtype_bytes 2 instead"):
        resolve(path, model=served)


@pytest.mark.parametrize(
    ("cluster", "missing"),
    [
        (ClusterShape(num_instances=4, num_pages=100, page_size=16), "4 instances of tp=1: .* nothing of sp3 tp1, sp4"),
        (
            ClusterShape(num_instances=1, num_pages=100, page_size=16, tp=2),
            "1 instances of tp=2: .* nothing of sp1 tp2",
        ),
    ],
)
def test_a_file_without_a_group_size_of_the_cluster_is_refused(path: str, cluster: ClusterShape, missing: str):
    with pytest.raises(ConfigError, match=missing):
        resolve(path, cluster=cluster)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot be read"):
        resolve(str(tmp_path / "none.json"))


def test_a_file_without_migrations_is_warned_about_where_keys_could_move(
    fitted: FittedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    path = tmp_path / "model.json"
    save(dataclasses.replace(fitted, migration=None, migration_errors=None), path)
    resolve(str(path), cluster=ClusterShape(num_instances=1, num_pages=100, page_size=16))
    assert "no keys will be moved" not in caplog.text
    resolve(str(path))
    assert "no keys will be moved" in caplog.text


@pytest.mark.parametrize(("dtype", "num_bytes"), [("bfloat16", 2), ("float32", 4)])
def test_the_shape_of_a_model_is_that_of_its_configuration(dtype: str, num_bytes: int):
    assert cost_shape(ModelSpec(LLAMA2, dtype)) == dataclasses.replace(LLAMA2_7B, dtype_bytes=num_bytes)
