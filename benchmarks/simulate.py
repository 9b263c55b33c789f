"""How fast a simulation runs on one core.

    python -m benchmarks.simulate --result FILE -- FLAGS OF loongjax simulate

Simulated seconds over seconds of this process's wall clock, and over those of CPU time that it got, which says more on
a machine that others use. Python and numpy run in one thread here. The capacity of a cluster is what it serves a second
when far more arrive: `--num-requests` at many times the rate that it can bear.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import shlex
import sys
import time
from typing import Any

import numpy as np
import tyro

from loongjax_profiling.metrics import ServingMetrics
from loongjax_profiling.provenance import checked_out_commit
from loongjax_profiling.simulate.assembly import assemble_system, make_workload, service_level
from loongjax_profiling.simulate.config import SimulateConfig
from loongjax_profiling.simulate.simulation import simulate


def measure(config: SimulateConfig) -> dict[str, Any]:
    """Simulates, and says how long it took."""
    system, workload, wish = assemble_system(config), make_workload(config), service_level(config)
    begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
    records = simulate(system, workload, slo=lambda request: wish, progress=sys.stderr.isatty())
    wall_s, cpu_s = time.perf_counter() - begin_s, time.process_time() - begin_cpu_s
    metrics = ServingMetrics.of(records)
    return {
        "num_instances": system.cluster.num_instances,
        "pod_size": system.pod_size,
        "policy": config.policy,
        "num_requests": len(records),
        "simulated_s": metrics.duration_s,
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "times_real_time": metrics.duration_s / wall_s,
        "times_real_time_of_cpu": metrics.duration_s / cpu_s,
        "metrics": metrics.as_json(),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--result", type=pathlib.Path, required=True, help="where to write it, as JSON")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="of `loongjax simulate`, after --")
    arguments = parser.parse_args(argv)
    flags = [flag for flag in arguments.flags if flag != "--"]
    report = {
        "command": f"python -m benchmarks.simulate --result {arguments.result} -- {shlex.join(flags)}",
        "commit": checked_out_commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one of them used",
        "python": platform.python_version(),
        "numpy": np.__version__,
        **measure(tyro.cli(SimulateConfig, prog="python -m benchmarks.simulate", args=flags)),
    }
    arguments.result.write_text(json.dumps(report, indent=2) + "\n")
    print({key: value for key, value in report.items() if key != "metrics"})
    return 0


if __name__ == "__main__":
    sys.exit(main())
