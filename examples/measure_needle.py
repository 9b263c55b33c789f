"""Measures over HTTP how often a served model finds the key: 200 unseen keys at every length, at all depths.

loongjax serve &
python examples/measure_needle.py --out accuracy.json
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import logging
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tokenizers import Tokenizer

from needle.accuracy import summarize
from needle.arguments import count, existing_path, path_in_folder, prompt_length
from needle.prompts import Example, PromptWriter

logger = logging.getLogger("measure_needle")
SHIPPED_TOKENIZER = Path(__file__).parent.parent / "loongjax" / "checkpoints" / "needle" / "tokenizer.json"
MAX_TOKENS = 16
"""The answer and EOS are 12."""


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    args = parse_args()
    writer = PromptWriter(Tokenizer.from_file(str(args.tokenizer)), args.seed)
    rows = []
    for length in args.lengths:
        started_s = time.perf_counter()
        depths, examples = zip(*writer.spread_examples(length, args.num_keys), strict=True)
        with ThreadPoolExecutor(args.concurrency) as pool:
            completions = list(pool.map(functools.partial(ask, args.base_url), examples))
        is_right = [completion == example.answer for completion, example in zip(completions, examples, strict=True)]
        rows.append(dataclasses.asdict(summarize(length, depths, is_right)))
        logger.info("%s in %.1f s", rows[-1], time.perf_counter() - started_s)
        if args.out is not None:
            result = {"command": " ".join(sys.argv), "seed": args.seed, "accuracy": rows}
            args.out.write_text(json.dumps(result, indent=1) + "\n")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000")
    parser.add_argument("--lengths", type=prompt_length, nargs="+", default=[2**i for i in range(6, 14)], help="tokens")
    parser.add_argument("--num-keys", type=count, default=200, help="at every length, spread over the depths")
    parser.add_argument("--concurrency", type=count, default=8, help="requests at a time")
    parser.add_argument("--seed", type=int, default=100)
    parser.add_argument(
        "--tokenizer", type=existing_path, default=SHIPPED_TOKENIZER, help="tokenizer.json to count tokens by"
    )
    parser.add_argument("--out", type=path_in_folder, help="JSON file for the results")
    return parser.parse_args()


def ask(base_url: str, example: Example) -> str:
    """The greedy completion's text. Ends the script where there is none."""
    body = json.dumps({"prompt": example.prompt, "max_tokens": MAX_TOKENS, "temperature": 0}).encode()
    try:
        request = urllib.request.Request(
            f"{base_url}/v1/completions", data=body, headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as response:
            return json.load(response)["choices"][0]["text"]
    except urllib.error.HTTPError as error:
        sys.exit(f"{base_url} answers {error.code}: {error.read().decode(errors='replace')[:500]}")
    except (OSError, ValueError) as error:
        sys.exit(
            f"nobody answers at --base-url {base_url} ({error}): start `loongjax serve` first, or name its address"
        )


if __name__ == "__main__":
    main()
