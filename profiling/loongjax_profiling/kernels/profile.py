"""`loongjax profile kernels`: which cases there are on this machine, and what becomes of their rows."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Sequence

import jax

from loongjax.errors import ConfigError
from loongjax.pallas_kernels.decode_attention import api as decode_api
from loongjax.pallas_kernels.extend_attention import api as extend_api
from loongjax.pallas_kernels.kv_update import api as update_api
from loongjax.pallas_kernels.prefill_attention import api as prefill_api
from loongjax.pallas_kernels.triton_gpu import is_triton_usable
from loongjax_profiling.command import KernelsCommand
from loongjax_profiling.kernels.case import Case, Row
from loongjax_profiling.kernels.dense import prefill_cases
from loongjax_profiling.kernels.mesh import checked, exchange_cases, ring_cases
from loongjax_profiling.kernels.paged import HEAD_DIM, decode_cases, extend_cases, update_cases
from loongjax_profiling.kernels.rivals import installed_rivals
from loongjax_profiling.kernels.table import format_rate, format_table, measure, to_json
from loongjax_profiling.kernels.timing import copy_bytes_per_second
from loongjax_profiling.output import prepare_file
from loongjax_profiling.provenance import checked_out_commit

CPU_SHRINK = 256
VARIANTS: dict[str, Iterable[str]] = {
    "decode": decode_api.VARIANTS,
    "extend": extend_api.VARIANTS,
    "kv_update": update_api.VARIANTS,
    "prefill": prefill_api.VARIANTS,
    "exchange": ("reference", "triton"),
    "ring": prefill_api.VARIANTS,
}
"""By op; the ring's are those of the attention in it."""
OPS_OF_MESHES = ("exchange", "ring")


def profile_kernels(command: KernelsCommand) -> int:
    """Measures, prints and stores. Returns 1 if a case could not be measured, else 0.

    Raises:
        ConfigError: no case is left, or no op has such a variant.
        KeyboardInterrupt: Ctrl-C ended it; the rows that were measured by then are printed and stored.
    """
    is_gpu = jax.devices()[0].platform == "gpu"
    ops = possible_ops(command.ops, len(jax.devices()))
    if left_out := [op for op in command.ops if op not in ops]:
        print(f"left out, since there is one device and they need two: {', '.join(left_out)}", file=sys.stderr)
    cases = select(choose_cases(command, ops, is_gpu=is_gpu), command.only)
    if not cases:
        raise ConfigError(f"--only {command.only!r} leaves nothing: it must be part of a row's description")
    if command.out is not None:
        prepare_file(command.out)
    copy_rate = copy_bytes_per_second(2 << 30 if is_gpu else 64 << 20)
    rows: list[Row] = []
    try:
        for row in measure(cases):
            rows.append(checked(row))
    except KeyboardInterrupt:
        _report(command, rows, copy_rate)
        print(f"ended by Ctrl-C after {len(rows)} of {len(cases)} rows", file=sys.stderr)
        raise
    _report(command, rows, copy_rate)
    return int(any(row.error is not None for row in rows))


def _report(command: KernelsCommand, rows: Sequence[Row], copy_rate: float) -> None:
    """Prints and stores."""
    num_devices = max((row.case.num_devices for row in rows), default=1)
    hardware = f"{num_devices} x {jax.devices()[0].device_kind}"
    print(f"{hardware}; a copy, read and written: {format_rate(copy_rate, 'B')}")
    print(format_table(rows, copy_rate))
    if command.out is not None:
        result = {
            "command": "loongjax profile " + " ".join(sys.argv[2:]),
            "hardware": hardware,
            "jax": jax.__version__,
            "commit": command.commit or checked_out_commit(),
            "copy_bytes_per_second": round(copy_rate),
        }
        command.out.write_text(to_json(result, rows, copy_rate))


def possible_ops(ops: Sequence[str], num_devices: int) -> list[str]:
    """Those of these that so many devices are enough for, each once.

    Raises:
        ConfigError: none is left.
    """
    possible = [op for op in dict.fromkeys(ops) if num_devices > 1 or op not in OPS_OF_MESHES]
    if not possible:
        raise ConfigError(f"--ops {' '.join(ops)}: that takes two devices or more, and there is one")
    return possible


def choose_cases(command: KernelsCommand, ops: Sequence[str], *, is_gpu: bool) -> list[Case]:
    """Raises ConfigError for a variant that one of `ops` does not have."""
    chosen = command.implementation
    for op in ops:
        names = VARIANTS[op]
        if chosen is not None and chosen not in names:
            raise ConfigError(f"--implementation {chosen}: {op} has {', '.join(names)}; --ops leaves ops out")
    shrink = command.shrink or (1 if is_gpu else CPU_SHRINK)
    prefill_variant = default_variant("prefill")
    made = {
        "decode": lambda: decode_cases(chosen or default_variant("decode"), shrink),
        "extend": lambda: extend_cases(chosen, shrink, prefill_variant=prefill_variant),
        "kv_update": lambda: update_cases(chosen or default_variant("kv_update"), shrink),
        "prefill": lambda: prefill_cases(chosen or prefill_variant, shrink, installed_rivals() if is_gpu else {}),
        "exchange": lambda: exchange_cases(chosen, len(jax.devices()), has_targets=shrink == 1),
        "ring": lambda: ring_cases(chosen or prefill_variant, len(jax.devices()), shrink),
    }
    return list(itertools.chain.from_iterable(made[op]() for op in ops))


def select(cases: Sequence[Case], only: str) -> list[Case]:
    """The cases whose work holds `only`, and those that they are compared with."""
    chosen = [case for case in cases if only in case.work]
    baselines = {(case.op, *case.baseline) for case in chosen if case.baseline is not None}
    return [case for case in cases if case in chosen or (case.op, case.work, case.variant) in baselines]


def default_variant(op: str) -> str:
    """What decode or prefill attention or kv_update takes here by itself."""
    match op:
        case "decode":
            return decode_api.default_variant("bfloat16", HEAD_DIM)
        case "kv_update":
            return "triton" if is_triton_usable() else "reference"
        case _:
            device = jax.local_devices()[0]
            capability = getattr(device, "compute_capability", "")
            return prefill_api.default_variant(device.platform, capability, "bfloat16", HEAD_DIM)
