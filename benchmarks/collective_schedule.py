"""What a compiled program's schedule runs beside its collectives, read from XLA's text of it."""

from __future__ import annotations

import dataclasses
import re

KERNEL = 'custom_call_target="mosaic_gpu'
COMPUTATION = re.compile(r"^(?:ENTRY )?%(?P<name>[\w.\-]+) .*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%(?P<name>[\w.\-]+) = (?P<rest>.*)$")
COLLECTIVE = re.compile(r"(?:collective-permute|all-gather)(?P<half>-start|-done)?\(%(?P<operand>[\w.\-]+)")
COPY = re.compile(r"(?P<dtype>[a-z]+\d+)\[(?P<shape>[\d,]*)\]\S* copy\(")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """Counts over all computations of a program, each once, however often it runs."""

    beside_kernel: int
    """Collectives that run while at least one attention kernel does."""
    beside_nothing: int
    """Collectives that everything waits for, or that only something else hides."""
    copied_bytes: int
    """Of arrays that XLA copies as they are."""


def read_schedule(text: str) -> Schedule:
    """Reads `compiled.as_text()` of a scheduled module: instructions stand in the order in which they are launched."""
    with_kernel = _computations_with_kernel(text)
    in_flight: dict[str, bool] = {}
    beside = {True: 0, False: 0}
    copied_bytes = 0
    for line in text.splitlines():
        instruction = INSTRUCTION.match(line)
        if instruction is None:
            continue
        if KERNEL in line or any(called in with_kernel for called in re.findall(r"calls=%([\w.\-]+)", line)):
            in_flight = dict.fromkeys(in_flight, True)
        if collective := COLLECTIVE.search(line):
            is_sync = '"is_sync":true' in line
            if collective["half"] == "-start" and not is_sync:
                in_flight[instruction["name"]] = False
            elif collective["half"] == "-done":
                beside[in_flight.pop(collective["operand"], False)] += 1
            elif collective["half"] is None:
                beside[False] += 1
        if copy := COPY.search(line):
            copied_bytes += _num_bytes(copy["dtype"], copy["shape"])
    return Schedule(beside_kernel=beside[True], beside_nothing=beside[False], copied_bytes=copied_bytes)


def _computations_with_kernel(text: str) -> set[str]:
    """Names of the computations that hold the kernel itself: fusions around it and its slices."""
    names, current = set(), ""
    for line in text.splitlines():
        if computation := COMPUTATION.match(line):
            current = computation["name"]
        elif KERNEL in line:
            names.add(current)
    return names


def _num_bytes(dtype: str, shape: str) -> int:
    num_elements = 1
    for size in filter(None, shape.split(",")):
        num_elements *= int(size)
    return num_elements * max(int(re.sub(r"\D", "", dtype)) // 8, 1)
