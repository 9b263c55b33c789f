"""One log line every few seconds while the engine is busy, and none while it is idle."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Mapping

from loongjax.engine.client import EngineClient, EngineStats
from loongjax.errors import EngineDeadError

logger = logging.getLogger(__name__)

INTERVAL_S = 10.0
ANSWER_TIMEOUT_S = 10.0
"""How long the step loop may take to tell its numbers before someone should look, in seconds: it may be compiling."""


@contextlib.asynccontextmanager
async def logged_activity(engine: EngineClient, interval_s: float | None = None) -> AsyncGenerator[None, None]:
    """Logs what the engine does, while the context is open and the engine lives; `interval_s` None: INTERVAL_S."""
    task = asyncio.create_task(_log_activity(engine, INTERVAL_S if interval_s is None else interval_s))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def describe_activity(before: EngineStats, after: EngineStats, elapsed_s: float) -> str | None:
    """What happened between two snapshots; None if nothing did, and nothing is to be done.

    Args:
        before: the earlier snapshot.
        after: the later one.
        elapsed_s: the time between them, above 0.
    """
    is_busy = after.num_requests_running + after.num_requests_waiting > 0
    if not is_busy and after.num_iterations == before.num_iterations:
        return None
    prompt_rate = (after.num_prompt_tokens - before.num_prompt_tokens) / elapsed_s
    output_rate = (after.num_generation_tokens - before.num_generation_tokens) / elapsed_s
    parts = [
        f"{after.num_requests_running} running, {after.num_requests_waiting} waiting",
        f"{prompt_rate:.1f} prompt and {output_rate:.1f} output tokens/s",
        f"KV pool {100 * sum(after.kv_slots_used) / max(sum(after.kv_slots), 1):.1f} % used",
        f"mean DoP {_mean_dop(before.prefill_dop, after.prefill_dop)} of prefills, "
        f"{_mean_dop(before.decode_dop, after.decode_dop)} of decodes",
    ]
    return "; ".join(parts)


def _mean_dop(before: Mapping[int, int], after: Mapping[int, int]) -> str:
    """Over the iterations since; a dash if there were none."""
    counts = {dop: count - before.get(dop, 0) for dop, count in after.items()}
    num_iterations = sum(counts.values())
    if num_iterations == 0:
        return "-"
    return f"{sum(dop * count for dop, count in counts.items()) / num_iterations:.2f}"


async def _log_activity(engine: EngineClient, interval_s: float) -> None:
    last: tuple[float, EngineStats] | None = None
    while True:
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                stats = await engine.stats()
        except TimeoutError:
            logger.warning("the engine gave no statistics: no answer within %g s", ANSWER_TIMEOUT_S)
        except EngineDeadError as error:
            logger.error("the engine is dead: %s", error)
            return
        else:
            now_s = time.monotonic()
            line = describe_activity(last[1], stats, now_s - last[0]) if last is not None else None
            if line is not None:
                logger.info("%s", line)
            last = now_s, stats
        await asyncio.sleep(interval_s)
