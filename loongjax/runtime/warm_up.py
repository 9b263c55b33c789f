"""Builds every executable that the step loop may need, before it starts.

Each program is compiled once a bucket and group size, many at a time, into the persistent cache, and then loaded for
every set of instances by running it on padding, as often as it takes to be as fast as ever.
"""

from __future__ import annotations

import itertools
import logging
import time

import jax
from tqdm import tqdm

from loongjax.core.cluster import Group
from loongjax.runtime.compilation import compile_calls
from loongjax.runtime.program_calls import ProgramCalls
from loongjax.runtime.protocol import WARM_UP_ROUNDS

logger = logging.getLogger(__name__)


def warm_up(calls: ProgramCalls, num_instances: int) -> int:
    """Runs every program of every group of instances on nothing but padding. Returns how many calls that took."""
    started = time.monotonic()
    sizes = [Group.of(range(dop)) for dop in range(1, num_instances + 1)]
    described = [calls.described(call) for group in sizes for call in calls.all_of(group)]
    for future in compile_calls(calls, described):
        future.result()
    groups = [
        Group.of(chosen)
        for dop in range(1, num_instances + 1)
        for chosen in itertools.combinations(range(num_instances), dop)
    ]
    num_calls = 0
    # Round by round: whenever XLA loads an executable with graphs, it drops the graphs of all others.
    for index in range(WARM_UP_ROUNDS):
        title = f"Warming up, round {index + 1} of {WARM_UP_ROUNDS}"
        for group in tqdm(groups, desc=title, unit="group", disable=None):
            for call in calls.all_of(group):
                # One by one: their results together would take gigabytes beside a pool that fills the memory.
                jax.block_until_ready(calls.run(call))
                num_calls += 1
    logger.info("warmed up %d groups, %d calls, in %.1f s", len(groups), num_calls, time.monotonic() - started)
    return num_calls
