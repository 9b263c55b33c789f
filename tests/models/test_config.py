"""config.json and generation_config.json, right and wrong."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loongjax.errors import CheckpointError, ConfigError
from loongjax.models.config import ModelConfig
from loongjax.models.generation import GenerationConfig
from loongjax.models.rope import LinearRope, Llama3Rope, Rope, YarnRope
from tests.checkpoints import BASE, VARIANTS, as_v4, make_checkpoint

LLAMA2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_cache": True,
    "vocab_size": 32000,
}


def config_of(**changes) -> ModelConfig:
    return ModelConfig.from_dict(BASE | {"dtype": "float32"} | changes)


def test_llama_2_7b_is_read_as_its_authors_wrote_it():
    assert ModelConfig.from_dict(LLAMA2_7B) == ModelConfig(
        hidden_size=4096,
        num_layers=32,
        num_q_heads=32,
        num_kv_heads=32,
        head_dim=128,
        intermediate_size=11008,
        vocab_size=32000,
        rms_norm_eps=1e-5,
        max_position_embeddings=4096,
        rope=Rope(theta=10000.0),
        dtype="float16",
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_both_forms_of_a_config_mean_the_same(variant):
    v5 = BASE | VARIANTS[variant] | {"dtype": "bfloat16"}
    v4 = as_v4(v5)
    assert "rope_parameters" not in v4
    assert "dtype" not in v4
    assert ModelConfig.from_dict(v4) == ModelConfig.from_dict(v5)


def test_the_rope_type_has_two_spellings():
    old = config_of(rope_parameters=None, rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2})
    new = config_of(rope_parameters=None, rope_theta=5e5, rope_scaling={"rope_type": "linear", "factor": 2})
    assert old.rope == new.rope == LinearRope(theta=5e5, factor=2.0)


def test_theta_within_rope_parameters_wins_over_the_one_beside_them():
    assert config_of(rope_theta=1.0, rope_parameters={"rope_type": "default", "rope_theta": 7.0}).rope == Rope(
        theta=7.0
    )


def test_theta_is_ten_thousand_by_default():
    assert config_of(rope_parameters=None).rope == Rope(theta=10000.0)


def test_llama3_rope_is_read():
    rope = config_of(**VARIANTS["rope_llama3"]).rope
    assert rope == Llama3Rope(
        theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=512
    )


def test_yarn_takes_its_factor_from_the_two_context_lengths_if_it_has_none():
    rope = config_of(
        max_position_embeddings=4096, rope_parameters={"rope_type": "yarn", "original_max_position_embeddings": 512}
    ).rope
    assert rope == YarnRope(factor=8.0, original_max_position_embeddings=512)


def test_heads_dims_and_dtypes_have_the_defaults_of_transformers():
    raw = {name: value for name, value in BASE.items() if name not in ("num_key_value_heads", "rms_norm_eps")}
    config = ModelConfig.from_dict(raw | {"head_dim": None})
    assert config.num_kv_heads == config.num_q_heads == 8
    assert config.head_dim == 8
    assert config.rms_norm_eps == 1e-6
    assert config.dtype == "float32"


@pytest.mark.parametrize(
    ("changes", "found", "works"),
    [
        ({"architectures": ["MistralForCausalLM"], "model_type": "mistral"}, "MistralForCausalLM", "LlamaForCausalLM"),
        ({"architectures": None, "model_type": "qwen2"}, "qwen2", "LlamaForCausalLM"),
        ({"hidden_act": "gelu"}, "gelu", "silu"),
        ({"quantization_config": {"bits": 4}}, "quantization_config", "unquantized"),
        ({"sliding_window": 4096}, "sliding_window", "full attention"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "longrope", "default, linear, llama3, yarn"),
        ({"rope_parameters": {"type": "dynamic", "factor": 2.0}}, "dynamic", "default, linear, llama3, yarn"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor", "missing"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0.0}}, "0.0", "at least 1"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": -1.0}}, "-1.0", "above 1"),
        ({"rope_parameters": [1]}, "[1]", "object"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "0.5", "only 1"),
        ({"hidden_size": None}, "hidden_size", "missing"),
        ({"hidden_size": "64"}, "'64'", "integer"),
        ({"num_hidden_layers": True}, "True", "integer"),
        ({"num_hidden_layers": 0}, "0", "at least 1"),
        ({"num_attention_heads": 0}, "num_attention_heads", "head_dim"),
        ({"num_key_value_heads": 3}, "(3)", "multiple"),
        ({"hidden_size": 60}, "60", "head_dim"),
        ({"head_dim": 7}, "7", "even"),
        ({"tie_word_embeddings": "yes"}, "'yes'", "true or false"),
        ({"dtype": "float8"}, "float8", "float32, bfloat16, float16"),
        ({"rms_norm_eps": float("nan")}, "nan", "number"),
    ],
)
def test_what_cannot_be_served_is_refused_with_what_was_found_and_what_would_work(changes, found, works, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(BASE | changes))
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.from_checkpoint(tmp_path)
    message = str(caught.value)
    assert str(tmp_path) in message
    assert found in message
    assert works in message


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "\x00"])
def test_a_config_that_is_no_json_object_is_refused(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        ModelConfig.from_checkpoint(tmp_path)


def test_a_folder_without_config_and_a_path_without_folder_are_told_apart(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        ModelConfig.from_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="is not a folder"):
        ModelConfig.from_checkpoint(tmp_path / "meta-llama" / "Llama-2-7b-hf")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


@given(
    st.dictionaries(st.sampled_from([*sorted(BASE), "rope_scaling", "rope_theta", "head_dim", "dtype"]), json_values)
)
def test_no_config_raises_anything_but_the_two_errors(changes):
    with contextlib.suppress(CheckpointError, ConfigError):
        ModelConfig.from_dict(BASE | changes)


@given(
    st.sampled_from(["default", "linear", "llama3", "yarn"]),
    st.dictionaries(
        st.sampled_from(
            [
                *("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
                *("attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow", "truncate"),
            ]
        ),
        json_values | st.floats(0.5, 100000.0),
    ),
)
def test_a_rope_that_is_accepted_has_finite_frequencies(kind, params):
    try:
        config = config_of(rope_parameters={"rope_type": kind} | params)
    except (CheckpointError, ConfigError):
        return
    frequencies = config.rope.inverse_frequencies(16)
    assert frequencies.dtype == "float32"
    assert all(0 <= frequency < float("inf") for frequency in frequencies.tolist())
    assert config.context_len >= 1


def test_the_vocabulary_is_padded_to_a_multiple_of_tp():
    config = config_of(vocab_size=321)
    assert [config.padded_vocab_size(tp) for tp in (1, 2, 3, 4, 8)] == [321, 322, 321, 324, 328]


def test_a_tp_that_does_not_divide_is_refused_with_those_that_do():
    config = config_of(num_key_value_heads=4, intermediate_size=96)
    for tp in (1, 2, 4):
        config.check_tp(tp)
    for tp in (0, 3, 8):
        with pytest.raises(ConfigError, match=r"that works: 1, 2, 4$"):
            config.check_tp(tp)


def test_eos_ids_of_both_files_count(tmp_path):
    make_checkpoint(tmp_path, "gqa", overrides={"eos_token_id": 3})
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 1]}))
    assert GenerationConfig.from_checkpoint(tmp_path).eos_token_ids == (1, 3, 9)


def test_without_generation_config_the_model_config_names_eos(tmp_path):
    (make_checkpoint(tmp_path, "gqa") / "generation_config.json").unlink()
    assert GenerationConfig.from_checkpoint(tmp_path) == GenerationConfig(eos_token_ids=(1,), default_sampling={})


def test_sampling_defaults_are_those_named_whether_or_not_do_sample_is_set(tmp_path):
    make_checkpoint(tmp_path, "gqa")
    named = {"temperature": 0.6, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.1}
    for do_sample in (True, False):
        path = tmp_path / "generation_config.json"
        path.write_text(json.dumps(named | {"do_sample": do_sample, "min_p": None, "max_length": 4096}))
        assert GenerationConfig.from_checkpoint(tmp_path).default_sampling == named


@pytest.mark.parametrize(
    "changes",
    [
        {"top_p": 0},
        {"temperature": "hot"},
        {"top_k": 1.5},
        {"top_k": float("inf")},
        {"eos_token_id": "</s>"},
        {"eos_token_id": [-1]},
    ],
)
def test_a_generation_config_with_impossible_values_is_refused(changes, tmp_path):
    (make_checkpoint(tmp_path, "gqa") / "generation_config.json").write_text(json.dumps(changes))
    with pytest.raises(CheckpointError, match=next(iter(changes))):
        GenerationConfig.from_checkpoint(tmp_path)
