"""Streams over a step loop in a thread and in a child process."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest

from loongjax.core.request import FinishReason, Request, ServiceLevel
from loongjax.core.sampling import SamplingParams
from loongjax.engine.async_engine import AsyncEngine
from loongjax.engine.client import EngineClient, OutputDelta
from loongjax.engine.loop import EngineHost
from loongjax.engine.messages import AddRequests, ToEngine
from loongjax.engine.process import EngineProcess
from loongjax.engine.thread import EngineThread
from loongjax.errors import CheckpointError, ContextLengthError, EngineDeadError, QueueFullError
from tests.engine.cluster import Cluster
from tests.engine.fake_runtime import expected_tokens
from tests.engine.hosted import Factory, LetterTokenizer, breaks_while_built, cannot_be_built

CLUSTER = Cluster()
SLOW = Cluster(step_s=0.02)
SAMPLING = SamplingParams(max_tokens=10, seed=1, ignore_eos=True, skip_special_tokens=False)
BOTH = pytest.mark.parametrize("host_type", [EngineThread, EngineProcess])

HostType = Callable[..., EngineHost]


def run(main: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(60):
            await main

    asyncio.run(limited())


@asynccontextmanager
async def started(host: EngineHost) -> AsyncIterator[AsyncEngine]:
    engine = AsyncEngine(host, LetterTokenizer(), seed=1)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


async def collect(
    engine: EngineClient, prompt: list[int], sampling: SamplingParams, name: str = "r"
) -> list[OutputDelta]:
    return [delta async for delta in engine.generate(prompt, sampling, request_id=name)]


def tokens_of(deltas: list[OutputDelta]) -> tuple[int, ...]:
    return tuple(token_id for delta in deltas for token_id in delta.token_ids)


def expected(prompt: list[int], sampling: SamplingParams) -> tuple[int, ...]:
    assert sampling.seed is not None
    assert sampling.max_tokens is not None
    return expected_tokens(
        Request(
            request_id="r",
            prompt_token_ids=tuple(prompt),
            sampling=sampling,
            max_tokens=sampling.max_tokens,
            seed=sampling.seed,
        )
    )


async def is_quiet(engine: AsyncEngine) -> None:
    """Waits until the engine holds nothing."""
    while True:
        stats = await engine.stats()
        if not (stats.num_requests_running or stats.num_requests_waiting):
            assert set(stats.kv_slots_used) == {0}
            return
        await asyncio.sleep(0.01)


@BOTH
def test_many_clients_get_their_own_tokens_and_some_leave_early(host_type: HostType) -> None:
    async def main() -> None:
        async with started(host_type(Factory())) as engine:
            rng = random.Random(0)

            async def client(i: int) -> None:
                prompt = [rng.randrange(64) for _ in range(rng.randrange(1, 60))]
                sampling = dataclasses.replace(SAMPLING, seed=i, max_tokens=rng.randrange(1, 30))
                stream = engine.generate(prompt, sampling, request_id="same name")
                deltas = []
                async for delta in stream:
                    deltas.append(delta)
                    if i % 3 == 0 and len(deltas) == 3:
                        await stream.aclose()  # pyright: ignore[reportAttributeAccessIssue]
                        return
                assert tokens_of(deltas) == expected(prompt, sampling)
                assert "".join(delta.text for delta in deltas) == LetterTokenizer().decode(tokens_of(deltas))
                assert [delta.finish_reason is not None for delta in deltas] == [False] * (len(deltas) - 1) + [True]
                assert deltas[-1].finish_reason is FinishReason.LENGTH
                assert deltas[-1].history[0].kind == "prefill"

            async with asyncio.TaskGroup() as tasks:
                for i in range(60):
                    tasks.create_task(client(i))
            await is_quiet(engine)

    run(main())


@BOTH
def test_cancelling_the_reader_aborts_the_request(host_type: HostType) -> None:
    async def main() -> None:
        async with started(host_type(Factory(SLOW))) as engine:
            task = asyncio.create_task(collect(engine, [1, 2], dataclasses.replace(SAMPLING, max_tokens=100)))
            await asyncio.sleep(0.2)
            assert (await engine.stats()).num_requests_running == 1
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await is_quiet(engine)

    run(main())


def test_samples_interleave_and_differ() -> None:
    async def main() -> None:
        async with started(EngineThread(Factory())) as engine:
            deltas = await collect(engine, [1, 2], dataclasses.replace(SAMPLING, n=3))
            by_index = [tokens_of([delta for delta in deltas if delta.index == i]) for i in range(3)]
            assert len(set(by_index)) == 3
            assert by_index[0] == expected([1, 2], SAMPLING)
            assert deltas[1].index != deltas[0].index

    run(main())


def test_a_stop_string_aborts_in_the_engine_and_says_stop() -> None:
    async def main() -> None:
        async with started(EngineThread(Factory(SLOW))) as engine:
            tokens = expected([1, 2], dataclasses.replace(SAMPLING, max_tokens=100))
            text = LetterTokenizer().decode(tokens)
            sampling = dataclasses.replace(SAMPLING, max_tokens=100, stop=(text[5:8],))
            deltas = await collect(engine, [1, 2], sampling)
            assert "".join(delta.text for delta in deltas) == text[: text.index(text[5:8])]
            assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == (FinishReason.STOP, text[5:8])
            assert deltas[-1].history
            assert (await engine.stats()).num_generation_tokens < 20
            await is_quiet(engine)

    run(main())


@BOTH
def test_what_is_refused_is_refused_before_the_first_delta(host_type: HostType) -> None:
    async def main() -> None:
        async with started(host_type(Factory(dataclasses.replace(SLOW, max_queue_len=2)))) as engine:
            with pytest.raises(ContextLengthError, match="maximum context length"):
                await collect(engine, [1] * 200, SAMPLING)
            sampling = dataclasses.replace(SAMPLING, max_tokens=100, n=2)
            tasks = [asyncio.create_task(collect(engine, [1] * 20, sampling)) for _ in range(60)]
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            (error,) = {type(task.exception()) for task in done}
            assert error is QueueFullError
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await is_quiet(engine)

    run(main())


@BOTH
def test_an_engine_that_dies_ends_every_stream(host_type: HostType) -> None:
    async def main() -> None:
        async with started(host_type(Factory(fails_from=20))) as engine:
            results = await asyncio.gather(
                *(collect(engine, [i + 1], dataclasses.replace(SAMPLING, max_tokens=60)) for i in range(8)),
                return_exceptions=True,
            )
            assert all(isinstance(result, EngineDeadError) for result in results)
            assert "injected failure" in str(results[0])
            with pytest.raises(EngineDeadError, match="injected failure"):
                await collect(engine, [1], SAMPLING)
            with pytest.raises(EngineDeadError):
                await engine.check_health()

    run(main())


@BOTH
def test_errors_of_building_are_raised_as_they_are(host_type: HostType) -> None:
    async def main() -> None:
        with pytest.raises(CheckpointError, match="cut short"):
            await AsyncEngine(host_type(cannot_be_built), LetterTokenizer()).start()
        with pytest.raises(EngineDeadError, match="ZeroDivisionError: of all things"):
            await AsyncEngine(host_type(breaks_while_built), LetterTokenizer()).start()

    run(main())


def test_health_is_asked_of_the_step_loop() -> None:
    class Wedged(Cluster):
        def core(self, *args: Any, **kwargs: Any) -> Any:
            core = super().core(*args, **kwargs)
            vars(core)["check_health"] = lambda: time.sleep(1.0)
            return core

    async def main() -> None:
        async with started(EngineThread(Factory())) as engine:
            await engine.check_health()
        async with started(EngineThread(lambda: Wedged().core())) as engine:
            with pytest.raises(EngineDeadError, match=r"did not answer within 0.1 s"):
                await engine.check_health(0.1)

    run(main())


def test_draining_refuses_new_requests_and_lets_live_ones_end() -> None:
    async def main() -> None:
        async with started(EngineThread(Factory(SLOW))) as engine:
            task = asyncio.create_task(collect(engine, [1, 2], SAMPLING))
            await asyncio.sleep(0.1)
            drain = asyncio.create_task(engine.drain(30))
            await asyncio.sleep(0)
            with pytest.raises(EngineDeadError, match="draining"):
                await collect(engine, [1], SAMPLING)
            await drain
            assert tokens_of(await task) == expected([1, 2], SAMPLING)

    run(main())


def test_draining_aborts_what_is_left_when_time_is_over() -> None:
    async def main() -> None:
        async with started(EngineThread(Factory(SLOW))) as engine:
            task = asyncio.create_task(collect(engine, [1, 2], dataclasses.replace(SAMPLING, max_tokens=100)))
            await asyncio.sleep(0.1)
            await engine.drain(0.1)
            assert (await task)[-1].finish_reason is FinishReason.ABORT
            await is_quiet(engine)

    run(main())


@BOTH
def test_closing_ends_live_requests(host_type: HostType) -> None:
    async def main() -> None:
        async with started(host_type(Factory(SLOW))) as engine:
            task = asyncio.create_task(collect(engine, [1, 2], dataclasses.replace(SAMPLING, max_tokens=100)))
            await asyncio.sleep(0.1)
        with pytest.raises(EngineDeadError, match="stopped"):
            await task
        with pytest.raises(EngineDeadError):
            await engine.stats()

    run(main())


def test_a_killed_child_ends_every_stream_at_once() -> None:
    async def main() -> None:
        host = EngineProcess(Factory(SLOW))
        async with started(host) as engine:
            task = asyncio.create_task(collect(engine, [1, 2], dataclasses.replace(SAMPLING, max_tokens=100)))
            await asyncio.sleep(0.2)
            assert host.pid is not None
            os.kill(host.pid, signal.SIGKILL)
            begin = time.monotonic()
            with pytest.raises(EngineDeadError, match="exit code -9"):
                await task
            assert time.monotonic() - begin < 2.0

    run(main())


def test_the_child_gets_its_environment_before_the_engine_is_built() -> None:
    async def main() -> None:
        factory = Factory(needs_environment="LOONGJAX_TEST_VARIABLE")
        async with started(EngineProcess(factory, environment={"LOONGJAX_TEST_VARIABLE": "1"})) as engine:
            await engine.check_health()
        with pytest.raises(CheckpointError, match="LOONGJAX_TEST_VARIABLE is not set"):
            await AsyncEngine(EngineProcess(factory), LetterTokenizer()).start()

    run(main())


def test_the_child_takes_no_notice_of_ctrl_c_and_sigterm() -> None:
    async def main() -> None:
        host = EngineProcess(Factory())
        async with started(host) as engine:
            assert host.pid is not None
            os.kill(host.pid, signal.SIGINT)
            os.kill(host.pid, signal.SIGTERM)
            await asyncio.sleep(0.2)
            assert tokens_of(await collect(engine, [1, 2], SAMPLING)) == expected([1, 2], SAMPLING)

    run(main())


PARENT = """
import os, sys, time
from loongjax.engine.process import EngineProcess
from tests.engine.hosted import Factory

if __name__ == "__main__":
    host = EngineProcess(Factory())
    host.start(lambda message: print(type(message).__name__, host.pid, flush=True))
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_the_child_ends_with_its_parent(number: signal.Signals, tmp_path: pathlib.Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    parent = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert parent.stdout is not None
    word, pid = parent.stdout.readline().split()
    assert word == "Ready"
    parent.send_signal(number)
    parent.wait(10)
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while _is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _is_running(pid: str) -> bool:
    """Whether the process exists and is not merely waiting for somebody to take its exit code."""
    try:
        return "zombie" not in pathlib.Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_priorities_and_wishes_travel_with_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    host, sent, slo = EngineThread(Factory()), [], ServiceLevel(ttft_s=0.2)
    send = host.send

    def note_and_send(message: ToEngine) -> None:
        sent.append(message)
        send(message)

    async def main() -> None:
        async with started(host) as engine:
            stream = engine.generate([1, 2], SAMPLING, request_id="r", priority=4, slo=slo)
            assert [delta async for delta in stream]

    monkeypatch.setattr(host, "send", note_and_send)
    run(main())
    (added,) = [message for message in sent if isinstance(message, AddRequests)]
    assert [(request.priority, request.slo) for request in added.requests] == [(4, slo)]
