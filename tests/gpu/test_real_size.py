"""A Llama-2-7B of random weights serves a prompt of 4,096 tokens on one GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.first_numbers import SHAPES
from loongjax.config import EngineConfig
from loongjax.core.request import FinishReason, Request
from loongjax.core.sampling import SamplingParams
from loongjax.engine.client import ModelInfo
from loongjax.engine.core import EngineCore
from loongjax.models.checkpoint import random_weights
from loongjax.parallel.mesh import DeviceGrid
from loongjax.runtime.build import assemble_runtime
from loongjax.runtime.model_spec import ModelSpec
from loongjax.scheduler.simple import SimplePolicy

pytestmark = [pytest.mark.gpu, pytest.mark.alone]


def test_a_7b_serves_a_prompt_of_4096_tokens_in_the_memory_that_sizing_gave_it():
    config = EngineConfig(num_instances=1, max_num_batched_tokens=8192, max_num_seqs=4, warm_up=False)
    grid = DeviceGrid(jax.devices(), num_instances=1)
    shape = SHAPES["llama2-7b"]
    shards = random_weights(shape, dtype=jnp.bfloat16, devices=grid.instances, seed=0)
    runtime = assemble_runtime(config, ModelSpec(shape, "bfloat16", 1), grid, shards)
    assert runtime.shape.num_slots > 100_000, "sized from an H200's free memory"
    info = ModelInfo(
        checkpoint="llama2-7b",
        max_model_len=runtime.limits.max_model_len,
        vocab_size=shape.vocab_size,
        eos_token_ids=(),
        default_sampling={},
    )
    core = EngineCore(runtime, SimplePolicy(), info=info, checks=True)
    prompt = np.random.default_rng(0).integers(0, shape.vocab_size, 4096).tolist()
    sampling = SamplingParams(temperature=0.0, max_tokens=8, logprobs=0)
    core.add(Request(request_id="r", prompt_token_ids=tuple(prompt), sampling=sampling, max_tokens=8, seed=0))
    events = []
    while not core.is_idle:
        events += core.step(30.0)
    core.close()
    assert events[-1].finish_reason is FinishReason.LENGTH
    tokens = [token_id for event in events for token_id in event.token_ids]
    logprobs = [item.logprob for event in events for item in event.logprobs]
    assert len(tokens) == 8
    assert all(0 <= token_id < shape.vocab_size for token_id in tokens)
    assert all(np.isfinite(logprob) and logprob < 0 for logprob in logprobs)
