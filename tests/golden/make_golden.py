"""Writes the golden files beside it: what transformers' Llama computes in float32 on the test checkpoints.

It needs torch, of which no CPU build exists for this project's Python on every platform, so it has its own environment:

    python3.11 -m venv /tmp/golden
    /tmp/golden/bin/pip install torch==2.13.0 "transformers>=5.22,<5.24" safetensors numpy tokenizers
    /tmp/golden/bin/python -m tests.golden.make_golden

One <variant>.npz for every variant of `tests.checkpoints`, and rope.npz with the frequencies of many rope settings.
In <variant>.npz, for each prompt i of PROMPT_LENS:
    prompt_i                int32 [T]       token ids
    prompt_logprobs_i       float32 [T - 1] of tokens 1 .. T - 1, given those before
    greedy_i                int32 [G]       the most probable continuation, EOS ignored
    greedy_logprobs_i       float32 [G]
    margins_i               float32 [G]     most probable minus second most probable logit, at each greedy token
    top_positions_i         int32 [P]       positions whose next-token distribution is recorded
    top_ids_i, top_logprobs_i  [P, 5]       its five most probable tokens
and `checksum` (of the weights), `versions`.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.checkpoints import BASE, VARIANTS, checksum, make_checkpoint, make_weights
from tests.golden.rope_cases import ROPE_CASES

PROMPT_LENS = (1, 7, 40, 150, 300)
NUM_GREEDY = (48, 40, 32, 32, 24)
NUM_TOP = 5
PROMPT_SEED = 2024
FOLDER = Path(__file__).parent


def main() -> None:
    import numpy
    import torch  # pyright: ignore[reportMissingImports]
    import transformers

    torch.set_num_threads(1)
    versions = json.dumps(
        {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": numpy.__version__}
    )
    for variant in VARIANTS:
        arrays = golden_arrays(variant)
        path = FOLDER / f"{variant}.npz"
        np.savez_compressed(path, allow_pickle=False, versions=np.array(versions), **arrays)
        close = sum(int((arrays[f"margins_{i}"] <= 1e-3).sum()) for i in range(len(PROMPT_LENS)))
        median = float(np.median(np.concatenate([arrays[f"margins_{i}"] for i in range(len(PROMPT_LENS))])))
        distinct = len(set(np.concatenate([arrays[f"greedy_{i}"] for i in range(len(PROMPT_LENS))]).tolist()))
        print(f"{path.name}: median margin {median:.3f}, {close} margins <= 1e-3, {distinct} distinct greedy tokens")
    np.savez_compressed(FOLDER / "rope.npz", allow_pickle=False, versions=np.array(versions), **rope_arrays())


def golden_arrays(variant: str) -> dict[str, np.ndarray]:
    """All arrays of one variant."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import LlamaForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(folder, variant, with_tokenizer=False)
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    config = BASE | VARIANTS[variant]
    arrays = {"checksum": np.array(checksum(make_weights(config)))}
    generator = np.random.default_rng(PROMPT_SEED)
    for i, (length, num_greedy) in enumerate(zip(PROMPT_LENS, NUM_GREEDY, strict=True)):
        prompt = generator.integers(5, config["vocab_size"], length)
        ids = prompt.tolist()
        greedy, greedy_logprobs, margins = [], [], []
        prompt_logprobs = _logprobs(model, ids)
        for _ in range(num_greedy):
            logprobs = _logprobs(model, ids)
            best, second = np.argsort(-logprobs[-1], kind="stable")[:2]
            greedy.append(best)
            greedy_logprobs.append(logprobs[-1, best])
            margins.append(logprobs[-1, best] - logprobs[-1, second])
            ids.append(int(best))
        positions = np.unique(np.linspace(0, length - 1, 4).astype(np.int32))
        top_ids = np.argsort(-prompt_logprobs[positions], axis=-1, kind="stable")[:, :NUM_TOP]
        arrays |= {
            f"prompt_{i}": prompt.astype(np.int32),
            f"prompt_logprobs_{i}": prompt_logprobs[np.arange(length - 1), prompt[1:]].astype(np.float32),
            f"greedy_{i}": np.array(greedy, np.int32),
            f"greedy_logprobs_{i}": np.array(greedy_logprobs, np.float32),
            f"margins_{i}": np.array(margins, np.float32),
            f"top_positions_{i}": positions,
            f"top_ids_{i}": top_ids.astype(np.int32),
            f"top_logprobs_{i}": np.take_along_axis(prompt_logprobs[positions], top_ids, axis=-1).astype(np.float32),
        }
    return arrays


def _logprobs(model: Any, token_ids: list[int]) -> np.ndarray:
    """float64 [T, V], everything computed anew."""
    import torch  # pyright: ignore[reportMissingImports]

    with torch.no_grad():
        logits = model(torch.tensor([token_ids]), use_cache=False).logits[0]
    return torch.log_softmax(logits.double(), dim=-1).numpy()


def rope_arrays() -> dict[str, np.ndarray]:
    """Inverse frequencies and attention factor of every case of ROPE_CASES, by transformers."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    arrays = {}
    for name, case in ROPE_CASES.items():
        embedding = LlamaRotaryEmbedding(LlamaConfig(**case))
        arrays[f"{name}_inverse_frequencies"] = embedding.inv_freq.numpy()
        arrays[f"{name}_attention_factor"] = np.float64(embedding.attention_scaling)
    return arrays


if __name__ == "__main__":
    main()
