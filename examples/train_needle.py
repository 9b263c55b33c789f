"""Trains the small Llama that ships with loongjax: it finds a key hidden anywhere in a prompt of 64 to 16,384 tokens.

The text, the tokenizer and the weights all come from this script and its seed. On one NVIDIA H200:

    python examples/train_needle.py --out /tmp/needle

A few seconds on a CPU show that everything runs (and teach nothing):

    python examples/train_needle.py --out /tmp/needle --steps 4 --lengths 128 --batch-tokens 1024 --num-keys 2
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from needle.accuracy import Variant, measure_grid
from needle.model import ModelConfig, cudnn_attention, load_params, plain_attention, save_checkpoint
from needle.pool import build_pool
from needle.rows import make_batch
from needle.tokenizer import save_tokenizer, train_tokenizer
from needle.training import Trainer

logger = logging.getLogger("train_needle")

WARMUP_STEPS = 100


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    args = parse_args()
    started_s = time.perf_counter()
    config = ModelConfig(num_layers=args.layers, num_q_heads=args.heads, num_kv_heads=args.heads)
    tokenizer = train_tokenizer(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, args.out, config.max_model_len)
    on_gpu = jax.default_backend() == "gpu"
    attend = cudnn_attention if on_gpu else plain_attention
    trainer = Trainer(config, args.seed, attend, compute_dtype="bfloat16" if on_gpu else "float32")
    if args.init is not None:
        trainer.params = load_params(args.init)
    pool = build_pool(tokenizer, args.seed)

    log: list[dict[str, float]] = []
    for step, (length, learning_rate) in enumerate(schedule(args.stages)):
        elapsed_s = time.perf_counter() - started_s
        is_last = elapsed_s > 60 * args.minutes
        batch_size = max(1, args.batch_tokens // length)
        batch = make_batch(pool, args.seed, step, batch_size, length, config.max_model_len)
        metrics = trainer.step(batch, learning_rate * min(1.0, (step + 1) / WARMUP_STEPS))
        if step % args.log_every == 0 or is_last:
            values = {name: round(float(value), 5) for name, value in metrics.items()}
            log.append({"step": step, "elapsed_s": round(elapsed_s, 1), "length": length, **values})
            logger.info("%s", log[-1])
        if step % args.save_every == args.save_every - 1:
            save_checkpoint(trainer.params, config, args.out)
        if is_last:
            break
    save_checkpoint(trainer.params, config, args.out)
    trained_s = time.perf_counter() - started_s

    cells = []
    result = {
        "model": dataclasses.asdict(config),
        "hardware": f"{len(jax.devices())} x {jax.devices()[0].device_kind}",
        "arguments": {name: str(value) for name, value in vars(args).items()},
        "train_s": round(trained_s, 1),
        "log": log,
        "accuracy": cells,
    }
    stored = {name: value.astype(jnp.bfloat16) for name, value in trainer.params.items()}
    exact = {name: value.astype(jnp.float32) for name, value in stored.items()}
    variants = {
        "bfloat16": Variant(params=stored, attend=attend, tokens_per_pass=args.batch_tokens),
        "float32": Variant(params=exact, attend=plain_attention, tokens_per_pass=args.batch_tokens // 8),
    }
    grid = {"lengths": args.eval_lengths, "depths": args.eval_depths, "num_keys": args.num_keys, "seed": args.seed + 1}
    with jax.default_matmul_precision("highest"):
        for cell in measure_grid(variants, config, tokenizer, **grid):
            cells.append(dataclasses.asdict(cell))
            logger.info("%s", cell)
            (args.out / "needle_training.json").write_text(json.dumps(result, indent=1) + "\n")
    logger.info("trained in %.0f s, all done in %.0f s", trained_s, time.perf_counter() - started_s)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint and needle_training.json")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", type=Stage.parse, nargs="+", required=True, help="LENGTH:STEPS:RATE")
    parser.add_argument("--init", type=Path, help="folder of a checkpoint to start from instead of random weights")
    parser.add_argument("--minutes", type=float, default=60.0, help="stop training after this long, whatever the step")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--batch-tokens", type=int, default=2**17)
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[256, 1024, 4096, 8448, 16384], help="of training rows"
    )
    parser.add_argument("--eval-lengths", type=int, nargs="+", default=[2**i for i in range(13, 5, -1)])
    parser.add_argument("--eval-depths", type=float, nargs="+", default=[i / 10 for i in range(11)])
    parser.add_argument("--num-keys", type=int, default=200, help="in every cell of the accuracy grid")
    parser.add_argument("--log-every", type=int, default=50, help="steps")
    parser.add_argument("--save-every", type=int, default=1000, help="steps")
    return parser.parse_args()


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


def schedule(stages: Sequence[Stage]) -> Iterator[tuple[int, float]]:
    """Row length and learning rate of every step."""
    next_rates = [stage.learning_rate for stage in stages[1:]] + [0.0]
    for stage, next_rate in zip(stages, next_rates, strict=True):
        for step in range(stage.num_steps):
            share = step / stage.num_steps
            yield stage.length, (1.0 - share) * stage.learning_rate + share * next_rate


if __name__ == "__main__":
    main()
