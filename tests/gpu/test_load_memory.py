"""A 14 GB checkpoint goes to the GPU through little host memory."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from loongjax.models.checkpoint_files import tensor_shapes
from loongjax.models.config import ModelConfig

pytestmark = [pytest.mark.gpu, pytest.mark.alone]

ALLOWED_BYTES = 2 << 30
FILE_BYTES = 4_900_000_000
LLAMA2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
}

LOAD = """
import json, resource, sys
import jax, jax.numpy as jnp
from loongjax.models.checkpoint import load_weights
from loongjax.models.config import ModelConfig

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

device = jax.devices()[0]
jax.block_until_ready(jax.device_put(jnp.ones((8192, 4096), jnp.bfloat16), device) * 2)
before = peak()
shards = load_weights(sys.argv[1], ModelConfig.from_checkpoint(sys.argv[1]), dtype=jnp.bfloat16, devices=[[device]])
jax.block_until_ready(shards)
size = sum(leaf.nbytes for leaf in jax.tree.leaves(shards))
print(json.dumps({"growth": peak() - before, "size": size, "platform": device.platform}))
"""


def write_checkpoint(folder: Path) -> None:
    """Random bytes of a 7B's shapes, in files of about 5 GB and an index."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA2_7B))
    noise = (np.random.default_rng(0).standard_normal(1 << 25).astype(np.float32).view(np.uint32) >> 16).astype(
        np.uint16
    )
    files: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in tensor_shapes(ModelConfig.from_checkpoint(folder)).items():
        if size > FILE_BYTES:
            files.append({})
            size = 0
        files[-1][name] = tuple(shape)
        size += 2 * int(np.prod(shape))
    weight_map = {}
    for i, tensors in enumerate(files):
        file_name = f"model-{i + 1:05}-of-{len(files):05}.safetensors"
        header, offset = {}, 0
        for name, shape in tensors.items():
            end = offset + 2 * int(np.prod(shape))
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
            weight_map[name] = file_name
            offset = end
        encoded = json.dumps(header).encode()
        with (folder / file_name).open("wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            for shape in tensors.values():
                left = int(np.prod(shape))
                while left:
                    file.write(noise[: min(left, len(noise))].tobytes())
                    left -= min(left, len(noise))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_host_memory_grows_by_at_most_two_gib_and_the_largest_tensor(tmp_path, record_property):
    checkpoint = tmp_path / "checkpoint"
    write_checkpoint(checkpoint)
    largest = max(2 * int(np.prod(shape)) for shape in tensor_shapes(ModelConfig.from_checkpoint(checkpoint)).values())
    finished = subprocess.run(
        [sys.executable, "-c", LOAD, str(checkpoint)], capture_output=True, text=True, check=True, timeout=300
    )
    measured = json.loads(finished.stdout.splitlines()[-1])
    record_property("memory", measured)
    print(measured)
    assert measured["platform"] == "gpu"
    assert measured["size"] > 13e9
    assert measured["growth"] <= ALLOWED_BYTES + largest
