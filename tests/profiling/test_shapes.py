"""Named shapes, and runtimes of random weights."""

import subprocess
import sys
import typing

import pytest

from loongjax.config import EngineConfig
from loongjax.engine.cost_model import cost_shape
from loongjax.errors import ConfigError
from loongjax.runtime.model_spec import ModelSpec
from loongjax_profiling.iteration.command import IterationCommand
from loongjax_profiling.model_shapes import MODEL_SHAPES
from loongjax_profiling.random_runtime import build_random_runtime
from loongjax_profiling.shapes import SHAPES, named_shape
from loongjax_profiling.simulate.config import ModelName


def test_every_shape_can_be_asked_for_on_the_command_line():
    hint = typing.get_type_hints(IterationCommand)["random_weights"]
    named, _ = typing.get_args(hint)
    assert typing.get_args(named) == tuple(SHAPES)


@pytest.mark.parametrize(("name", "num_billions"), [("llama2-7b", 6.74), ("llama3-8b", 8.03)])
def test_the_models_have_as_many_weights_as_their_names_say(name, num_billions):
    config = named_shape(name)
    attention = 2 * config.hidden_size * (config.num_q_heads + config.num_kv_heads) * config.head_dim
    layer = attention + 3 * config.hidden_size * config.intermediate_size + 2 * config.hidden_size
    params = config.num_layers * layer + 2 * config.vocab_size * config.hidden_size + config.hidden_size
    assert round(params / 1e9, 2) == num_billions


def test_a_shape_that_is_not_known_is_refused_with_those_that_are():
    with pytest.raises(ConfigError, match="llama2-7b, llama3-8b, tiny"):
        named_shape("llama4")


def test_a_tp_that_does_not_divide_the_shape_is_refused():
    with pytest.raises(ConfigError, match="tp=3 does not divide"):
        build_random_runtime(EngineConfig(tp=3), named_shape("tiny"))


@pytest.mark.parametrize("name", list(SHAPES))
def test_an_engine_of_random_weights_has_the_cost_shape_that_a_simulation_reckons_with(name):
    config = named_shape(name)
    assert cost_shape(ModelSpec(config=config, dtype=config.dtype)) == MODEL_SHAPES[name]


def test_shapes_for_simulations_need_no_jax():
    code = "import sys, loongjax_profiling.model_shapes; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_every_model_that_can_be_simulated_has_a_shape():
    assert set(typing.get_args(ModelName)) <= set(MODEL_SHAPES)
