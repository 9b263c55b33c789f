"""How long a decode takes to begin, beside the steps that go on from it: what a request that joins costs the others.

    python -m benchmarks.decode_begin --shape llama3-8b --out benchmarks/results/decode_begin.json

A decode begins with what the host knows: its page tables and tokens go to the devices, and its program, which is to
read other memory than the last time, is made ready for that. A step that goes on is submitted behind the one before,
and finds everything there. Both are measured from the submission, or from the end of the step before, to the tokens on
the host, and are medians over repetitions, of which every other one has a prefill before it. Nothing is in flight when
one begins, as in an engine when the prefill before it was a long one or others wait; most of its decodes begin behind a
prefill that is in flight, and then nobody waits for the host.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys

from benchmarks import report
from loongjax.config import EngineConfig
from loongjax.costmodel.work import Strategy
from loongjax_profiling.iteration.case import Case
from loongjax_profiling.iteration.meter import Meter, MeterConfig
from loongjax_profiling.random_runtime import build_random_runtime
from loongjax_profiling.replay.traced_runtime import TracedRuntime
from loongjax_profiling.shapes import SHAPES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Begin:
    """Of one case, in milliseconds."""

    dop: int
    num_rows: int
    num_keys: int
    """Of each row."""
    first_ms: float
    behind_prefill_ms: float
    """As `first_ms`, right after a prefill."""
    second_ms: float
    """From the end of the first step, behind which it was submitted."""
    step_ms: float
    """Each further one."""


def measure(meter: Meter, runtime: TracedRuntime, case: Case, prefill: Case, repeats: int) -> Begin:
    """Begins a decode again and again."""
    meter.measure(prefill)
    meter.measure(case)
    firsts: tuple[list[float], list[float]] = [], []
    seconds: list[float] = []
    others: list[float] = []
    for index in range(2 * repeats):
        is_behind_prefill = index % 2 == 1
        if is_behind_prefill:
            meter.measure(prefill)
        runtime.take_iterations()
        meter.measure(case)
        first, second, *steps = [step.elapsed_s for step in runtime.take_iterations()]
        firsts[is_behind_prefill].append(first)
        seconds.append(second)
        others += steps
    alone_ms, behind_ms, second_ms, step_ms = [
        round(1e3 * statistics.median(times), 3) for times in (*firsts, seconds, others)
    ]
    return Begin(
        dop=case.strategy.sp,
        num_rows=case.batch_size,
        num_keys=case.input_len,
        first_ms=alone_ms,
        behind_prefill_ms=behind_ms,
        second_ms=second_ms,
        step_ms=step_ms,
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama3-8b", help="random weights of this shape")
    parser.add_argument("--dops", type=int, nargs="+", default=[1], help="instances of a decode")
    parser.add_argument("--rows", type=int, nargs="+", default=[4, 32], help="requests of a decode")
    parser.add_argument("--keys", type=int, default=4000, help="of each request")
    parser.add_argument("--num-slots", type=int, help="tokens of an instance's pool; by default what memory holds")
    parser.add_argument("--repeats", type=int, default=10, help="with and without a prefill before it, each")
    report.add_arguments(parser)
    arguments = parser.parse_args(argv)
    about = report.origin("decode_begin", argv, arguments.commit)
    config = EngineConfig(
        policy="simple",
        num_instances=max(arguments.dops),
        num_slots=arguments.num_slots,
        max_num_batched_tokens=arguments.keys,
        max_num_seqs=max(arguments.rows),
        warm_up=False,
    )
    runtime = TracedRuntime(build_random_runtime(config, SHAPES[arguments.shape]))
    meter = Meter(runtime, MeterConfig(rounds=1, num_steps=8))
    rows = []
    for dop in arguments.dops:
        strategy = Strategy(dop)
        prefill = Case(kind="prefill", strategy=strategy, batch_size=1, input_len=arguments.keys)
        for num_rows in arguments.rows:
            case = Case(
                kind="decode", strategy=strategy, batch_size=num_rows, input_len=arguments.keys, num_masters=dop
            )
            rows.append(dataclasses.asdict(measure(meter, runtime, case, prefill, arguments.repeats)))
            print(", ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    runtime.close()
    report.write(arguments.out, about | {"shape": arguments.shape}, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
