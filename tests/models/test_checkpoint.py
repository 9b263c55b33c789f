"""Weights on the devices, bit for bit, and every way in which a checkpoint can be wrong."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loongjax.errors import CheckpointError, ConfigError
from loongjax.models.checkpoint import load_weights, random_weights
from loongjax.models.config import ModelConfig
from loongjax.models.safetensors_file import SafetensorsFile
from loongjax.models.sharding import abstract_params, param_paths, partition_specs, split_dim, tensor_name
from tests.checkpoints import (
    BASE,
    VARIANTS,
    make_checkpoint,
    make_weights,
    tensor_shapes,
    write_safetensors,
    write_weights,
)

REPOSITORY = Path(__file__).parents[2]


def devices_of(num_instances: int, tp: int) -> list[list]:
    devices = jax.devices()
    return [devices[i * tp : (i + 1) * tp] for i in range(num_instances)]


def load(folder: Path, *, dtype="float32", num_instances=1, tp=1):
    config = ModelConfig.from_checkpoint(folder)
    return load_weights(folder, config, dtype=dtype, devices=devices_of(num_instances, tp))


def expected_shard(tensor: np.ndarray, path, rank: int, tp: int) -> np.ndarray:
    """By definition: zero rows up to a multiple of tp, then equal slices of one dim."""
    dim = {"o_proj": 1, "down_proj": 1}.get(path[-2], 0)
    if "norm" in str(path[-2]) or (dim == 1 and tensor.ndim == 1):
        return tensor
    if path[-2] in ("embed_tokens", "lm_head"):
        tensor = np.concatenate([tensor, np.zeros((-len(tensor) % tp, tensor.shape[1]), tensor.dtype)])
    return np.split(tensor, tp, axis=dim)[rank]


def assert_loaded(shards, variant: str, devices, *, dtype=np.float32, source_dtype=np.float32) -> None:
    weights = make_weights(BASE | VARIANTS[variant])
    for instance, instance_devices in enumerate(devices):
        for rank, device in enumerate(instance_devices):
            state = shards[instance][rank]
            paths, leaves = param_paths(state), jax.tree.leaves(state)
            assert {tensor_name(path) for path in paths} == set(weights)
            for path, leaf in zip(paths, leaves, strict=True):
                assert leaf.devices() == {device}
                assert leaf.dtype == dtype
                tensor = weights[tensor_name(path)].astype(source_dtype).astype(dtype)
                expected = expected_shard(tensor, path, rank, len(instance_devices))
                np.testing.assert_array_equal(np.asarray(leaf).view(np.uint8), expected.copy().view(np.uint8))


@pytest.mark.parametrize("variant", ["gqa", "bias", "tied", "odd_vocab"])
@pytest.mark.parametrize(("num_instances", "tp"), [(1, 1), (2, 4), (4, 2)])
def test_every_device_gets_its_slices_bit_for_bit(variant, num_instances, tp, tmp_path):
    make_checkpoint(tmp_path, variant, with_tokenizer=False)
    devices = devices_of(num_instances, tp)
    assert_loaded(load(tmp_path, num_instances=num_instances, tp=tp), variant, devices)


@pytest.mark.parametrize("source", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("target", ["float32", "bfloat16", "float16"])
def test_each_source_dtype_is_cast_to_each_target_as_numpy_casts(source, target, tmp_path):
    make_checkpoint(tmp_path, "gqa", dtype=source, with_tokenizer=False)
    numpy_dtype = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
    shards = load(tmp_path, dtype=target, tp=2)
    assert_loaded(shards, "gqa", devices_of(1, 2), dtype=numpy_dtype[target], source_dtype=numpy_dtype[source])


def test_an_index_of_many_files_is_honoured_and_files_beside_it_are_not(tmp_path):
    make_checkpoint(tmp_path, "gqa", num_files=3, with_tokenizer=False)
    write_safetensors(tmp_path / "adapter.safetensors", {"stray": np.zeros(3, np.float32)})
    assert len(list(tmp_path.glob("model-*.safetensors"))) == 3
    assert_loaded(load(tmp_path, tp=2), "gqa", devices_of(1, 2))


def test_files_of_any_name_are_read_where_there_is_no_index(tmp_path):
    make_checkpoint(tmp_path, "gqa", num_files=2, with_tokenizer=False)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert_loaded(load(tmp_path), "gqa", devices_of(1, 1))


def test_the_shards_make_up_the_state_that_partition_specs_describe(tmp_path):
    config = ModelConfig.from_checkpoint(make_checkpoint(tmp_path, "bias", with_tokenizer=False))
    params = abstract_params(config, dtype="float32", tp=4)
    [shards] = load(tmp_path, tp=4)
    assert jax.tree.structure(shards[3]) == jax.tree.structure(params) == jax.tree.structure(partition_specs(params))
    for path, whole, shard in zip(
        param_paths(params), jax.tree.leaves(params), jax.tree.leaves(shards[3]), strict=True
    ):
        expected = [size // 4 if dim == split_dim(path) else size for dim, size in enumerate(whole.shape)]
        assert list(shard.shape) == expected


def test_paths_and_leaves_keep_one_order_beyond_ten_layers():
    config = ModelConfig.from_dict(BASE | {"num_hidden_layers": 12})
    params = abstract_params(config, dtype="float32")
    for path, (key_path, _) in zip(param_paths(params), jax.tree.leaves_with_path(params), strict=True):
        assert [str(part) for part in path] == [str(getattr(key, "key", "")) for key in key_path[:-1]]


def with_weights(folder: Path, change) -> Path:
    """A checkpoint whose tensors `change` has altered."""
    make_checkpoint(folder, "gqa", with_tokenizer=False)
    weights = make_weights(BASE)
    change(weights)
    write_weights(folder, weights)
    return folder


def test_a_missing_tensor_is_named(tmp_path):
    with_weights(tmp_path, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"lacks tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        load(tmp_path)


def test_an_unexpected_tensor_is_named(tmp_path):
    with_weights(tmp_path, lambda weights: weights.update({"model.layers.2.extra": np.zeros(2, np.float32)}))
    with pytest.raises(CheckpointError, match=r"no place for: tensor model\.layers\.2\.extra"):
        load(tmp_path)


def test_rotary_frequencies_that_old_checkpoints_carry_are_ignored(tmp_path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    with_weights(tmp_path, lambda weights: weights.update({name: np.zeros(4, np.float32)}))
    assert_loaded(load(tmp_path), "gqa", devices_of(1, 1))


def test_an_output_layer_that_is_tied_may_be_stored_again(tmp_path):
    make_checkpoint(tmp_path, "tied", with_tokenizer=False)
    weights = make_weights(BASE | VARIANTS["tied"])
    write_weights(tmp_path, weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    assert_loaded(load(tmp_path), "tied", devices_of(1, 1))


def test_a_misshapen_tensor_is_named_with_both_shapes(tmp_path):
    with_weights(tmp_path, lambda weights: weights.update({"lm_head.weight": np.zeros((319, 64), np.float32)}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight has shape \[319, 64\].* must have \[320, 64\]"):
        load(tmp_path)


def test_a_tensor_of_integers_is_refused_with_the_dtypes_that_work(tmp_path):
    make_checkpoint(tmp_path, "gqa", with_tokenizer=False)
    weights = make_weights(BASE)
    norm = {"model.norm.weight": np.ones(64, np.int64)}
    write_safetensors(tmp_path / "model.safetensors", weights | norm)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has dtype I64; those supported: F32, F16, BF16"):
        load(tmp_path)


@pytest.mark.parametrize("num_bytes", [0, 4, 8, 100, 5000, -1])
def test_a_file_cut_short_anywhere_is_named_before_anything_is_loaded(num_bytes, tmp_path):
    path = make_checkpoint(tmp_path, "gqa", with_tokenizer=False) / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:num_bytes])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is (cut short|not a safetensors file)"):
        load(tmp_path)


def test_a_file_of_the_index_that_is_missing_is_named(tmp_path):
    make_checkpoint(tmp_path, "gqa", num_files=3, with_tokenizer=False)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors is missing"):
        load(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "../../x"}}'])
def test_an_index_that_is_none_is_refused(text, tmp_path):
    make_checkpoint(tmp_path, "gqa", with_tokenizer=False)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        load(tmp_path)


def test_pickled_weights_are_refused_with_the_way_to_convert_them(tmp_path):
    (make_checkpoint(tmp_path, "gqa", with_tokenizer=False) / "model.safetensors").rename(
        tmp_path / "pytorch_model.bin"
    )
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*save_pretrained"):
        load(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path):
    (make_checkpoint(tmp_path, "gqa", with_tokenizer=False) / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        load(tmp_path)


def test_a_missing_folder_is_refused(tmp_path):
    config = ModelConfig.from_dict(BASE)
    with pytest.raises(CheckpointError, match="is not a folder"):
        load_weights(tmp_path / "gone", config, dtype="float32", devices=devices_of(1, 1))


def test_a_tp_that_does_not_divide_is_refused(tmp_path):
    make_checkpoint(tmp_path, "gqa", with_tokenizer=False)
    with pytest.raises(ConfigError, match="tp=3 does not divide"):
        load(tmp_path, tp=3)


@given(data=st.data())
def test_no_damage_to_a_file_raises_anything_but_the_one_error(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    path = folder / "model.safetensors"
    write_safetensors(path, {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, np.float16)})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        with SafetensorsFile(path) as file:
            for name in file.tensors:
                file.read_rows(name)
    except CheckpointError as error:
        assert str(path) in str(error)  # noqa: PT017


def test_random_weights_have_the_structure_of_loaded_ones_and_depend_on_the_seed_alone(tmp_path):
    overrides = {"attention_bias": True, "intermediate_size": 64}
    make_checkpoint(tmp_path, "mha", with_tokenizer=False, overrides=overrides)
    config = ModelConfig.from_checkpoint(tmp_path)
    loaded = load(tmp_path, dtype="bfloat16", num_instances=2, tp=4)
    cut = random_weights(config, dtype="bfloat16", devices=devices_of(2, 4), seed=3)
    [[whole]] = random_weights(config, dtype="bfloat16", devices=devices_of(1, 1), seed=3)
    [[other]] = random_weights(config, dtype="bfloat16", devices=devices_of(1, 1), seed=4)
    for instance in range(2):
        for rank in range(4):
            like, state = loaded[instance][rank], cut[instance][rank]
            assert jax.tree.structure(state) == jax.tree.structure(like)
            for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(like), strict=True):
                assert (a.shape, a.dtype, a.devices()) == (b.shape, b.dtype, b.devices())
    for path, *leaves in zip(param_paths(whole), *map(jax.tree.leaves, (whole, *cut[1])), strict=True):
        first, *parts = (np.asarray(leaf) for leaf in leaves)
        dim = split_dim(path)
        np.testing.assert_array_equal(first, parts[0] if dim is None else np.concatenate(parts, axis=dim))
    assert not jnp.array_equal(jax.tree.leaves(whole)[0], jax.tree.leaves(other)[0])


MEASURE = """
    import os, sys
    from pathlib import Path
    import jax

    def peak_bytes():
        return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

    from loongjax.models.checkpoint import load_weights
    from loongjax.models.config import ModelConfig
    folder = Path(sys.argv[1])
    config = ModelConfig.from_checkpoint(folder)
    warm_up = ModelConfig.from_checkpoint(folder / "tiny")
    load_weights(folder / "tiny", warm_up, dtype="bfloat16", devices=[jax.devices()[:2]])
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_bytes()
    shards = load_weights(folder, config, dtype="bfloat16", devices=[jax.devices()[:2]])
    print(peak_bytes() - before, sum(leaf.nbytes for leaf in jax.tree.leaves(shards)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
def test_host_memory_grows_by_no_more_than_the_weights_and_three_tensors(tmp_path):
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4, "vocab_size": 4096}
    make_checkpoint(tmp_path / "tiny", "gqa", with_tokenizer=False)
    config = BASE | sizes | {"dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_safetensors(
        tmp_path / "model.safetensors",
        {name: np.zeros(shape, np.float32) for name, shape in tensor_shapes(config).items()},
    )
    file_bytes = (tmp_path / "model.safetensors").stat().st_size
    assert file_bytes > 250e6
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEASURE), str(tmp_path)],
        cwd=REPOSITORY,
        # glibc then gives back at once what is freed, and keeps nothing for later.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    growth, weight_bytes = map(int, result.stdout.split())
    largest = 4096 * 1024 * 4
    # The CPU backend holds the weights in host memory; on an accelerator only the rest remains.
    assert growth - weight_bytes < 3 * largest
