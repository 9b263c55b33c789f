"""How long a prefill takes behind a decode, beside the same one behind another prefill and on idle devices.

    python -m benchmarks.prefill_begin --shape llama3-8b --out benchmarks/results/prefill_begin.json

What prompts that come while others decode wait for the host: a prefill is submitted when a step has ended, behind the
step that was in flight already, and the host has as long as that one takes to make it ready. `loongjax profile
iteration` measures prefills behind each other, where the host has all the time it needs. One at a time, prompts are
given to an engine in which some requests decode, and to one in which none does; each is measured from the end of what
is before it on the devices, or from its submission, to its result on the host.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import sys

import numpy as np

from benchmarks import report
from loongjax.core.request import Request
from loongjax.costmodel.work import Strategy
from loongjax.engine.core import EngineCore
from loongjax_profiling.iteration.case import Case
from loongjax_profiling.iteration.meter import Meter
from loongjax_profiling.random_requests import random_request
from loongjax_profiling.replay.config import ReplayConfig
from loongjax_profiling.replay.engine import ReplayEngine
from loongjax_profiling.replay.traced_runtime import TracedIteration, TracedRuntime
from loongjax_profiling.shapes import SHAPES

NUM_STEPS = 10
"""Of the decode, between two prefills."""
NUM_FIRST = 2
"""Prefills that do not count."""
TIMEOUT_S = 60.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillBegin:
    """Of one prompt length; medians, in milliseconds."""

    num_tokens: int
    in_a_row_ms: float
    """Behind another prefill of as many tokens."""
    alone_ms: float
    """On idle devices."""
    beside_decode_ms: float
    beside_decode_p90_ms: float
    lead_ms: float
    """From its submission beside the decode to the end of the step in flight; 0 if that had ended before."""
    num_late: int
    """Of those beside the decode, how many were submitted when that step had ended."""


def measure(
    core: EngineCore, runtime: TracedRuntime, num_tokens: int, decodes: list[Request], repeats: int
) -> PrefillBegin:
    """Prefills prompts of one length.

    Args:
        core: an engine of one instance, without requests.
        runtime: its runtime.
        num_tokens: of each prompt.
        decodes: requests that decode beside them, for as long as it takes.
        repeats: prefills that count, of each kind.
    """
    case = Case(kind="prefill", strategy=Strategy(1, runtime.shape.tp), batch_size=1, input_len=num_tokens)
    in_a_row_s = Meter(runtime).measure(case).seconds
    alone = _prefills(core, runtime, num_tokens, repeats)
    core.add(*decodes)
    _step(core, NUM_STEPS)
    beside = _prefills(core, runtime, num_tokens, repeats)
    assert core.num_live == len(decodes), "they were to decode all the time"
    for request in decodes:
        core.abort(request.request_id)
    while not core.is_idle:
        core.step(TIMEOUT_S)
    leads_ms = [1e3 * (each.begin_s - each.submitted_s) for each in beside]
    beside_ms = [1e3 * each.elapsed_s for each in beside]
    return PrefillBegin(
        num_tokens=num_tokens,
        in_a_row_ms=round(1e3 * in_a_row_s, 3),
        alone_ms=round(1e3 * statistics.median([each.elapsed_s for each in alone]), 3),
        beside_decode_ms=round(statistics.median(beside_ms), 3),
        beside_decode_p90_ms=round(float(np.percentile(beside_ms, 90)), 3),
        lead_ms=round(statistics.median(leads_ms), 3),
        num_late=sum(lead <= 0.0 for lead in leads_ms),
    )


def make_requests(name: str, number: int, *, num_tokens: int, max_tokens: int, vocab_size: int) -> list[Request]:
    """Random ones of equal lengths."""
    random = np.random.default_rng(num_tokens)
    return [
        random_request(random, f"{name}-{index}", prompt_len=num_tokens, output_len=max_tokens, vocab_size=vocab_size)
        for index in range(number)
    ]


def _prefills(core: EngineCore, runtime: TracedRuntime, num_tokens: int, repeats: int) -> list[TracedIteration]:
    """Of one prompt after the other, each of which ends by it, without the first ones."""
    prompts = make_requests(
        "prompt", NUM_FIRST + repeats, num_tokens=num_tokens, max_tokens=1, vocab_size=runtime.limits.vocab_size
    )
    runtime.take_iterations()
    for prompt in prompts:
        core.add(prompt)
        while not any(event.request_id == prompt.request_id for event in core.step(TIMEOUT_S)):
            pass
        if not core.is_idle:
            _step(core, NUM_STEPS)
    return [each for each in runtime.take_iterations() if each.kind == "prefill"][NUM_FIRST:]


def _step(core: EngineCore, number: int) -> None:
    for _ in range(number):
        core.step(TIMEOUT_S)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama3-8b", help="random weights of this shape")
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 64, 200, 500, 1000, 2000], help="of prompts")
    parser.add_argument("--decodes", type=int, default=8, help="requests that decode beside them")
    parser.add_argument("--keys", type=int, default=500, help="of each of these when it begins")
    parser.add_argument("--num-slots", type=int, help="tokens of the instance's pool; by default what memory holds")
    parser.add_argument("--repeats", type=int, default=20, help="prefills of each length and kind")
    report.add_arguments(parser)
    arguments = parser.parse_args(argv)
    about = report.origin("prefill_begin", argv, arguments.commit)
    max_output = 4 * NUM_STEPS * (NUM_FIRST + arguments.repeats + 1)
    max_len = max(*arguments.lengths, arguments.keys + max_output) + 1
    engine = ReplayEngine(
        ReplayConfig(
            random_weights=arguments.shape,
            policy="simple",
            num_instances=1,
            num_slots=arguments.num_slots,
            max_num_batched_tokens=max(max_len, arguments.keys * arguments.decodes),
            max_num_seqs=2 * arguments.decodes,
        )
    )
    decodes = make_requests(
        "decode", arguments.decodes, num_tokens=arguments.keys, max_tokens=max_output, vocab_size=engine.info.vocab_size
    )
    rows = []
    with contextlib.closing(engine):
        for num_tokens in arguments.lengths:
            row = measure(engine.new_core(), engine.runtime, num_tokens, decodes, arguments.repeats)
            rows.append(dataclasses.asdict(row))
            print(", ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    report.write(arguments.out, about | {"shape": arguments.shape}, rows, num_devices=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
