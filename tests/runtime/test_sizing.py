"""What is decided before anything is computed: the number format, the pool's size, and how long a request may be."""

import importlib
import logging
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from loongjax.config import CPU_NUM_SLOTS, EngineConfig
from loongjax.core.cluster import ClusterShape
from loongjax.errors import ConfigError
from loongjax.models.checkpoint import random_weights
from loongjax.models.config import ModelConfig
from loongjax.models.sharding import abstract_params, partition_specs
from loongjax.parallel.mesh import DeviceGrid, ReplicatedState
from loongjax.runtime import sizing
from loongjax.runtime.model_spec import ModelSpec
from loongjax.runtime.protocol import RuntimeLimits
from loongjax.runtime.sizing import pool_shape, resolve_dtype, runtime_limits

CONTEXT_LEN = 4096

MODEL = ModelConfig(
    hidden_size=8,
    num_layers=1,
    num_q_heads=1,
    num_kv_heads=1,
    head_dim=8,
    intermediate_size=8,
    vocab_size=16,
    max_position_embeddings=CONTEXT_LEN,
)
SPEC = ModelSpec(MODEL, "float32")


def size_pool(**settings: Any) -> ClusterShape:
    grid = DeviceGrid(jax.devices(), tp=1, num_instances=2)
    shards = random_weights(MODEL, dtype=jnp.float32, devices=grid.instances, seed=0)
    weights = ReplicatedState(grid, shards, partition_specs(abstract_params(MODEL, dtype=jnp.float32, tp=1)))
    return pool_shape(EngineConfig(**settings), SPEC, grid, weights)


def limits(num_slots: int, **settings: Any) -> RuntimeLimits:
    """Of two instances with so many tokens each."""
    shape = ClusterShape(num_instances=2, num_pages=num_slots // 16, page_size=16)
    return runtime_limits(EngineConfig(**settings), SPEC, shape)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("found", ["bfloat16", "float16"])
def test_auto_is_the_checkpoints_own_type(found, platform, caplog):
    with caplog.at_level(logging.INFO):
        assert resolve_dtype(EngineConfig(), found, platform) == found
    assert not caplog.records


def test_float32_is_served_as_bfloat16_on_gpu_and_the_log_says_so(caplog):
    with caplog.at_level(logging.INFO):
        assert resolve_dtype(EngineConfig(), "float32", "cpu") == "float32"
        assert not caplog.records
        assert resolve_dtype(EngineConfig(), "float32", "gpu") == "bfloat16"
    [record] = caplog.records
    assert record.levelno == logging.INFO
    assert "float32; serving it as bfloat16 (--dtype float32 keeps it)" in record.message


@pytest.mark.parametrize("asked", ["float32", "float16", "bfloat16"])
def test_a_type_that_is_asked_for_is_taken(asked, caplog):
    assert resolve_dtype(EngineConfig(dtype=asked), "float32", "gpu") == asked
    assert not caplog.records


def test_the_pool_has_the_stated_default_on_cpu():
    assert size_pool().num_slots == CPU_NUM_SLOTS


def test_the_pool_is_as_large_as_asked_for():
    shape = size_pool(num_slots=96, page_size=32)
    assert (shape.num_instances, shape.num_pages, shape.page_size) == (2, 3, 32)


@pytest.mark.parametrize(
    ("settings", "variant", "layers_held"),
    [
        pytest.param({"policy": "esp"}, "mosaic_gpu", 1, id="no extends"),
        pytest.param({"chunk_tokens": 512}, "mosaic_gpu", 1, id="chunks too small to bring pages into order"),
        pytest.param({"chunk_tokens": 4000}, "mosaic_gpu", 2, id="large chunks"),
        pytest.param({"chunk_tokens": 4000, "page_size": 32}, "mosaic_gpu", 1, id="large chunks, large pages"),
        pytest.param({"chunk_tokens": 512, "page_size": 1}, "mosaic_gpu", 2, id="pages that are always copied"),
        pytest.param({"chunk_tokens": 4000, "page_size": 1}, "triton", 1, id="a kernel that copies nothing"),
    ],
)
def test_on_a_gpu_the_pool_takes_what_is_free_beside_one_layer_of_it_where_extends_copy_it(
    settings, variant, layers_held, monkeypatch
):
    kernel = importlib.import_module("loongjax.pallas_kernels.extend_attention.mosaic_gpu")
    monkeypatch.setattr(kernel, "is_triton_usable", lambda: True)
    monkeypatch.setattr(sizing, "default_variant", lambda *_, **__: variant)
    free, workspace = 1_000_000, 200_000
    monkeypatch.setattr(DeviceGrid, "platform", "gpu")
    monkeypatch.setattr(sizing, "_free_bytes", lambda device: free)
    monkeypatch.setattr(sizing, "_workspace_bytes", lambda *_: workspace)
    logits = sizing.SAMPLER_BYTES_PER_LOGIT * 64 * SPEC.config.padded_vocab_size(1)
    shape = size_pool(max_num_seqs=64, **({"policy": "chunked"} | settings))
    # The model has one layer.
    largest = (free - workspace - logits) // (layers_held * SPEC.num_kv_bytes_per_token)
    assert shape.num_slots == largest // shape.page_size * shape.page_size


def test_a_page_larger_than_the_pool_is_refused():
    with pytest.raises(ConfigError, match="no memory is left for a KV pool"):
        size_pool(page_size=2 * CPU_NUM_SLOTS)


def test_a_context_that_fits_is_the_models(caplog):
    assert limits(CONTEXT_LEN).max_model_len == CONTEXT_LEN
    assert not caplog.records


@pytest.mark.parametrize(
    ("num_slots", "settings", "expected"),
    [
        pytest.param(1024, {}, 2048, id="the pool"),
        pytest.param(CONTEXT_LEN, {"max_num_batched_tokens": 512}, 1024, id="the largest prefill"),
        pytest.param(1024, {"max_model_len": 3000}, 2048, id="less than asked for"),
        pytest.param(1024, {"policy": "chunked", "max_num_batched_tokens": 512}, 2048, id="the pool, prompts are cut"),
    ],
)
def test_the_context_is_capped_by_what_all_instances_hold_and_the_log_says_so(num_slots, settings, expected, caplog):
    assert limits(num_slots, **settings).max_model_len == expected
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert f"requests may have {expected} tokens" in record.message


def test_a_shorter_context_than_the_models_can_be_asked_for(caplog):
    assert limits(CONTEXT_LEN, max_model_len=100).max_model_len == 100
    assert not caplog.records


def test_a_longer_context_than_the_models_is_warned_of(caplog):
    assert limits(2 * CONTEXT_LEN, max_model_len=CONTEXT_LEN + 1).max_model_len == CONTEXT_LEN + 1
    assert "exceeds the context that the model was made for, 4096" in caplog.text
