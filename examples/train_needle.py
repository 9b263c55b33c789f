"""Trains the small Llama that ships with loongjax: it finds a key hidden anywhere in a prompt of many tokens.

The text, the tokenizer and the weights all come from this script and its seed. With all the defaults, which made the
checkpoint in loongjax/checkpoints/needle, it takes three minutes of one H200:

    python examples/train_needle.py --out /tmp/needle

A minute of two CPU cores shows that everything runs, and a model that is often right in short prompts:

    python examples/train_needle.py --out /tmp/needle --batch-tokens 4096 --stages 256:60:2e-3 --lengths 64
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from tokenizers import Tokenizer

from needle.accuracy import Variant, find_right, summarize
from needle.arguments import count, existing_path, prompt_length
from needle.model import ModelConfig, Params, cudnn_attention, load_params, plain_attention, save_checkpoint
from needle.pool import build_pool
from needle.prompts import PromptWriter
from needle.rows import make_batch
from needle.tokenizer import save_tokenizer, train_tokenizer
from needle.training import Trainer

logger = logging.getLogger("train_needle")

WARMUP_STEPS = 100
LOG_EVERY_STEPS = 25
SAVE_EVERY_STEPS = 100
CONFIG = ModelConfig()


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    args = parse_args()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"--out {args.out} is no folder and cannot be made one ({error.strerror})")
    tokenizer = train_tokenizer(args.seed)
    save_tokenizer(tokenizer, args.out, CONFIG.max_model_len)
    result = {
        "model": dataclasses.asdict(CONFIG),
        "hardware": f"{len(jax.devices())} x {jax.devices()[0].device_kind}, {platform.machine()}",
        "arguments": {name: str(value) for name, value in vars(args).items() if name != "out"},
    }
    started_s = time.perf_counter()
    params, result["log"] = train(args, tokenizer)
    result["train_s"] = round(time.perf_counter() - started_s)
    result["accuracy"] = {"bfloat16": [], "float32": []}
    for length in args.lengths:
        for dtype, rows in result["accuracy"].items():
            rows.append(measure(args, tokenizer, params, length, dtype))
            logger.info("%s %s", dtype, rows[-1])
            (args.out / "needle_training.json").write_text(json.dumps(result, indent=1) + "\n")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint and needle_training.json")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", type=Stage.parse, nargs="+", default=DEFAULT_STAGES, help="LENGTH:STEPS:RATE")
    parser.add_argument("--minutes", type=float, default=120.0, help="stop training after this long, whatever the step")
    parser.add_argument("--batch-tokens", type=count, default=32768, help="of a step, but at least one row")
    parser.add_argument("--init", type=existing_path, help="folder of a checkpoint to start from instead of a sketch")
    parser.add_argument(
        "--lengths", type=prompt_length, nargs="+", default=[2**i for i in range(6, 14)], help="to measure"
    )
    parser.add_argument(
        "--num-keys", type=count, default=200, help="to measure at every length, spread over all depths"
    )
    return parser.parse_args()


def train(args: argparse.Namespace, tokenizer: Tokenizer) -> tuple[Params, list[dict[str, float]]]:
    """Trains for the stages or the minutes, whichever end first; returns the parameters and the log."""
    on_gpu = jax.default_backend() == "gpu"
    attend = cudnn_attention if on_gpu else plain_attention
    trainer = Trainer(CONFIG, args.seed, attend, compute_dtype="bfloat16" if on_gpu else "float32")
    if args.init is not None:
        trainer.params = load_params(args.init)
    pool = build_pool(tokenizer, args.seed)
    log: list[dict[str, float]] = []
    started_s = time.perf_counter()
    for step, (length, learning_rate) in enumerate(schedule(args.stages)):
        batch_size = max(1, args.batch_tokens // length)
        batch = make_batch(pool, args.seed, step, batch_size, length, CONFIG.max_model_len)
        metrics = trainer.step(batch, learning_rate * min(1.0, (step + 1) / WARMUP_STEPS))
        if step % LOG_EVERY_STEPS == 0:
            values = {name: round(float(value), 4) for name, value in metrics.items()}
            log.append({"step": step, "elapsed_s": round(time.perf_counter() - started_s), "length": length, **values})
            logger.info("%s", log[-1])
        if step % SAVE_EVERY_STEPS == 0:
            save_checkpoint(trainer.params, CONFIG, args.out)
        if time.perf_counter() - started_s > 60 * args.minutes:
            break
    save_checkpoint(trainer.params, CONFIG, args.out)
    return trainer.params, log


def measure(
    args: argparse.Namespace, tokenizer: Tokenizer, params: Params, length: int, dtype: str
) -> dict[str, object]:
    """The accuracy of the stored, bfloat16 weights when computing in `dtype`."""
    attend = cudnn_attention if jax.default_backend() == "gpu" and dtype == "bfloat16" else plain_attention
    weights = {name: value.astype(jnp.bfloat16).astype(dtype) for name, value in params.items()}
    variant = Variant(params=weights, attend=attend, tokens_per_pass=max(args.batch_tokens, length))
    depths, examples = zip(*PromptWriter(tokenizer, args.seed + 1).spread_examples(length, args.num_keys), strict=True)
    with jax.default_matmul_precision("highest"):
        is_right = find_right(variant, CONFIG, tokenizer, examples)
    return dataclasses.asdict(summarize(length, depths, is_right))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of the training with rows of one length."""

    length: int
    """Tokens of a row."""
    num_steps: int
    learning_rate: float
    """At its beginning; it falls linearly to the next stage's, or to 0."""

    @classmethod
    def parse(cls, argument: str) -> Stage:
        """Reads LENGTH:STEPS:RATE. Raises ValueError."""
        length, num_steps, learning_rate = argument.split(":")
        return cls(length=int(length), num_steps=int(num_steps), learning_rate=float(learning_rate))


DEFAULT_STAGES = [
    Stage.parse(stage) for stage in ("256:1000:2e-3", "1024:3000:2e-3", "4096:1000:1e-3", "8192:300:5e-4")
]


def schedule(stages: Sequence[Stage]) -> Iterator[tuple[int, float]]:
    """Row length and learning rate of every step."""
    next_rates = [stage.learning_rate for stage in stages[1:]] + [0.0]
    for stage, next_rate in zip(stages, next_rates, strict=True):
        for step in range(stage.num_steps):
            share = step / stage.num_steps
            yield stage.length, (1.0 - share) * stage.learning_rate + share * next_rate


if __name__ == "__main__":
    main()
