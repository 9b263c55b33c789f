"""Compilation in many threads, into JAX's caches: XLA compiles outside of Python's lock."""

from __future__ import annotations

import concurrent.futures
import math
import os
import threading
import time
from collections.abc import Sequence

import jax
from tqdm import tqdm

from loongjax.runtime.program_calls import Call, ProgramCalls

MAX_COMPILE_THREADS = 16


def num_compile_threads() -> int:
    """How many programs are compiled side by side."""
    return min(MAX_COMPILE_THREADS, os.cpu_count() or 1)


def compile_calls(
    calls: ProgramCalls, described: Sequence[Call], *, timeout_s: float | None = None
) -> list[concurrent.futures.Future[None]]:
    """Compiles in the order given. None of the devices may have anything to do: XLA tries out kernels on them.

    Args:
        calls: that made them.
        described: each as `ProgramCalls.described` gives it.
        timeout_s: after so many seconds nothing more is begun; None: never.

    Returns:
        For each call a future that is done; cancelled if the time did not suffice.
    """
    lowering = threading.Lock()
    is_over = threading.Event()
    deadline_s = math.inf if timeout_s is None else time.monotonic() + timeout_s

    def lower_and_compile(call: Call) -> None:
        with jax.set_mesh(calls.mesh(call)):
            with lowering:  # holds Python's lock anyway, and Triton compiles its kernels in it
                if is_over.is_set() or time.monotonic() >= deadline_s:
                    raise concurrent.futures.CancelledError
                lowered = call.program.lower(*call.arguments)  # type: ignore[attr-defined]
            lowered.compile()

    threads = concurrent.futures.ThreadPoolExecutor(num_compile_threads(), thread_name_prefix="loongjax-compile")
    try:
        futures = [threads.submit(lower_and_compile, call) for call in described]
        ended = concurrent.futures.as_completed(futures, timeout_s)
        try:
            for _ in tqdm(ended, total=len(futures), desc="Compiling", unit="program", disable=None, leave=False):
                pass
        except TimeoutError:
            pass
    finally:
        is_over.set()
        threads.shutdown(cancel_futures=True)
    return futures


def was_tried(future: concurrent.futures.Future[None]) -> bool:
    """Whether a call's turn came, though it may have failed."""
    return not future.cancelled() and not isinstance(future.exception(), concurrent.futures.CancelledError)
