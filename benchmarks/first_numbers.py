"""First numbers of the engine on real sizes: random weights, no HTTP, prompts of random tokens.

    python -m benchmarks.first_numbers --shape llama2-7b --out benchmarks/results/first_numbers.json

For each case it gives the time from acceptance to the first token (prefill) and the mean time of a decode step, both as
the engine's step loop sees them, median over repetitions.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np

from benchmarks import report
from loongjax.config import EngineConfig
from loongjax.core.request import RequestEvent
from loongjax.engine.build import choose_policy
from loongjax.engine.client import ModelInfo
from loongjax.engine.core import EngineCore
from loongjax_profiling.random_requests import random_request
from loongjax_profiling.random_runtime import build_random_runtime
from loongjax_profiling.shapes import SHAPES


def build(shape: str, args: argparse.Namespace) -> tuple[EngineCore, dict[str, float]]:
    """An engine of random weights, and how long it took to build, in seconds."""
    config = EngineConfig(
        tp=args.tp,
        num_instances=args.num_instances,
        num_slots=args.num_slots,
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_num_seqs=32,
        prefill_tokens_per_instance=args.prefill_tokens_per_instance,
        warm_up=args.warm_up,
        exchange=args.exchange,
    )
    started = time.monotonic()
    runtime = build_random_runtime(config, SHAPES[shape])
    ready_s = time.monotonic() - started
    info = ModelInfo(
        checkpoint=shape,
        max_model_len=runtime.limits.max_model_len,
        vocab_size=runtime.limits.vocab_size,
        eos_token_ids=(),
        default_sampling={},
    )
    policy = choose_policy(config, runtime.shape, runtime.limits, runtime.spec)
    core = EngineCore(runtime, policy, info=info, kv_bytes_per_token=runtime.num_kv_bytes_per_token)
    return core, {"ready_s": ready_s}


def measure(core: EngineCore, num_requests: int, prompt_len: int, output_len: int) -> dict[str, float]:
    """Equal requests that come at once: seconds to the first token, of the last of them and in the mean, and seconds a
    decode step once all decode.
    """
    rng = np.random.default_rng(prompt_len + num_requests)
    vocab_size = core.info.vocab_size
    requests = [
        random_request(rng, f"{i}", prompt_len=prompt_len, output_len=output_len, vocab_size=vocab_size)
        for i in range(num_requests)
    ]
    started = time.monotonic()
    core.add(*requests)
    first_s: dict[str, float] = {}
    times: list[float] = []
    while core.num_live:
        events: list[RequestEvent] = core.step(10.0)
        now = time.monotonic()
        for event in events:
            assert event.error is None, event.error
            first_s.setdefault(event.request_id, now - started)
        if events and len(first_s) == num_requests:
            times.append(now)
    while not core.is_idle:
        core.step(10.0)
    gaps = np.diff(times)
    return {
        "first_token_s": max(first_s.values()),
        "mean_first_token_s": float(np.mean(list(first_s.values()))),
        "decode_step_s": float(np.median(gaps)) if len(gaps) else 0.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama2-7b")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--num-instances", type=int)
    parser.add_argument("--num-slots", type=int)
    parser.add_argument("--max-num-batched-tokens", type=int, default=4096 + 64)
    parser.add_argument("--prefill-tokens-per-instance", type=int, default=2048)
    parser.add_argument("--warm-up", action="store_true", help="build every executable first, as serve does on GPU")
    parser.add_argument("--exchange", choices=["auto", "xla"], default="auto", help="auto: through peer memory")
    parser.add_argument("--cases", nargs="+", default=["1x1024", "1x4096", "8x1024"], help="requests x prompt tokens")
    parser.add_argument("--output-len", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    report.add_arguments(parser)
    args = parser.parse_args()
    about = report.origin("first_numbers", None, args.commit)

    core, built = build(args.shape, args)
    print(f"ready after {built['ready_s']:.1f} s; {core.stats().kv_slots} slots", flush=True)
    rows = []
    for case in args.cases:
        num_requests, prompt_len = map(int, case.split("x"))
        started = time.monotonic()
        measure(core, num_requests, prompt_len, args.output_len)
        warm_up_s = time.monotonic() - started
        runs = [measure(core, num_requests, prompt_len, args.output_len) for _ in range(args.repeats)]
        row = {"case": case, "warm_up_s": warm_up_s}
        row |= {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        row["spread"] = {name: [min(run[name] for run in runs), max(run[name] for run in runs)] for name in runs[0]}
        rows.append(row)
        print(json.dumps(row), flush=True)
    about |= {
        "built": built,
        "prefill_dop": core.stats().prefill_dop,
        "decode_dop": core.stats().decode_dop,
        "recompiles": core.stats().num_recompiles,
    }
    report.write(args.out, about, rows)
    core.close()


if __name__ == "__main__":
    main()
