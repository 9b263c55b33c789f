"""Tiny Llama checkpoints in Hugging Face's format, equal to the last bit wherever they are made.

Needs numpy, and `tokenizers` for the tokenizer; no JAX, no torch, so that the golden files' maker can use it too.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

BASE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "vocab_size": 320,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}

VARIANTS: dict[str, dict[str, Any]] = {
    "mha": {"num_key_value_heads": 8},
    "gqa": {},
    "gqa_deep": {"num_key_value_heads": 2, "num_hidden_layers": 3},
    "rope_linear": {"head_dim": 16, "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "rope_llama3": {
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        },
    },
    "rope_yarn": {
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 256,
        },
    },
    "rope_yarn_mscale": {
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 50000.0,
            "factor": 8.0,
            "original_max_position_embeddings": 512,
            "mscale": 1.0,
            "mscale_all_dim": 0.5,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "truncate": False,
        },
    },
    "tied": {"tie_word_embeddings": True},
    "bias": {"attention_bias": True, "mlp_bias": True},
    "head_dim": {"head_dim": 24},
    "odd_vocab": {"vocab_size": 321},
    "config_v4": {
        "head_dim": 16,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0},
    },
}
"""What each variant changes in BASE. "config_v4" is written as version 4 of transformers did."""

SPECIAL_TOKENS = ("<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>")

MERGES = (
    *("Ġ t", "Ġ a", "h e", "i n", "r e", "o n", "Ġt he", "e r", "Ġ s", "a t", "Ġ w", "Ġ o"),
    *("e n", "Ġ c", "i t", "i s", "a n", "o r", "e s", "Ġ b", "e d", "Ġ f", "in g"),
)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_checkpoint(
    folder: Path | str,
    variant: str = "gqa",
    *,
    dtype: str = "float32",
    num_files: int = 1,
    seed: int = 0,
    with_tokenizer: bool = True,
    overrides: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a checkpoint and returns its folder.

    Args:
        folder: made if absent.
        variant: a key of VARIANTS.
        dtype: of the tensors and by config.json: "float32", "bfloat16" or "float16".
        num_files: 1 writes model.safetensors; more, an index and that many files.
        seed: of the weights.
        with_tokenizer: also write a byte-level tokenizer of 284 tokens, with a chat template.
        overrides: further changes of config.json, in the form of version 5.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = BASE | VARIANTS[variant] | {"dtype": dtype} | dict(overrides or {})
    written = as_v4(config) if variant == "config_v4" else config
    (folder / "config.json").write_text(json.dumps(written, indent=1))
    generation = {"bos_token_id": 0, "eos_token_id": [1], "transformers_version": "5.23.0"}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=1))
    write_weights(folder, make_weights(config, seed=seed), dtype=dtype, num_files=num_files)
    if with_tokenizer:
        write_tokenizer(folder)
    return folder


def as_v4(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json as version 4 of transformers wrote it, with the oldest spelling of the rope type."""
    written = {name: value for name, value in config.items() if name not in ("rope_parameters", "dtype")}
    rope = dict(config["rope_parameters"])
    written["rope_theta"] = rope.pop("rope_theta")
    rope["type"] = rope.pop("rope_type")
    return written | {"rope_scaling": None if rope["type"] == "default" else rope, "torch_dtype": config["dtype"]}


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor, in the order in which they are drawn."""
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    q_dim, kv_dim = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    matrices = {
        "self_attn.q_proj": (q_dim, hidden),
        "self_attn.k_proj": (kv_dim, hidden),
        "self_attn.v_proj": (kv_dim, hidden),
        "self_attn.o_proj": (hidden, q_dim),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        for name, shape in matrices.items():
            shapes[f"{prefix}{name}.weight"] = shape
            if config["attention_bias"] if name.startswith("self_attn") else config["mlp_bias"]:
                shapes[f"{prefix}{name}.bias"] = shape[:1]
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def make_weights(config: Mapping[str, Any], *, seed: int = 0) -> dict[str, np.ndarray]:
    """float32 tensors, uniform, of a scale at which logits have a standard deviation of about 1.5.

    Only PCG64's raw words are used, whose stream numpy promises never to change, and exact float32 operations.
    """
    bits = np.random.PCG64(seed)
    weights = {name: _draw(bits, name, shape) for name, shape in tensor_shapes(config).items()}
    if config["tie_word_embeddings"]:  # as they are drawn, every token would predict itself
        weights["model.embed_tokens.weight"] *= np.float32(0.25)
        weights["model.norm.weight"] *= np.float32(1.5)
    return weights


def _draw(bits: np.random.PCG64, name: str, shape: tuple[int, ...]) -> np.ndarray:
    words = bits.random_raw(math.prod(shape)) >> np.uint64(40)
    uniform = words.astype(np.float32).reshape(shape) * np.float32(2.0**-23) - np.float32(1)  # in [-1, 1)
    if "norm" in name:
        return np.float32(1) + np.float32(0.25) * uniform
    if name.endswith("bias"):
        return np.float32(0.5) * uniform
    gain = {"embed_tokens": 4.0, "lm_head": 1.5, "q_proj": 1.2, "k_proj": 1.2}.get(name.split(".")[-2], 1.0)
    return np.float32(gain * math.sqrt(3.0 / shape[1])) * uniform


def write_weights(
    folder: Path, weights: Mapping[str, np.ndarray], *, dtype: str = "float32", num_files: int = 1
) -> None:
    """Writes model.safetensors, or an index and `num_files` files."""
    if dtype == "bfloat16":
        import ml_dtypes

        weights = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in weights.items()}
    else:
        weights = {name: tensor.astype(dtype) for name, tensor in weights.items()}
    if num_files == 1:
        write_safetensors(folder / "model.safetensors", weights)
        return
    names = list(weights)
    weight_map = {}
    for file_idx in range(num_files):
        file_name = f"model-{file_idx + 1:05d}-of-{num_files:05d}.safetensors"
        part = {name: weights[name] for name in names[file_idx::num_files]}
        write_safetensors(folder / file_name, part)
        weight_map |= dict.fromkeys(part, file_name)
    total_size = sum(tensor.nbytes for tensor in weights.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """One safetensors file: the header's length, the header, the tensors."""
    codes = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64"}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        header[name] = {"dtype": codes[str(tensor.dtype)], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor).tobytes())


def checksum(weights: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of names, shapes and float32 values: tells a drifted maker from a wrong model."""
    digest = hashlib.sha256()
    for name, tensor in weights.items():
        digest.update(f"{name}{tensor.shape}".encode())
        digest.update(tensor.astype("<f4").tobytes())
    return digest.hexdigest()


def write_tokenizer(folder: Path) -> None:
    """tokenizer.json (byte-level BPE) and tokenizer_config.json with a chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    tokens = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(m.replace(" ", "") for m in MERGES)]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    merges = [(left, right) for left, right in (merge.split(" ") for merge in MERGES)]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=1))
