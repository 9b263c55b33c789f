"""GET /health of a real engine whose devices never answer: a step loop in a thread, a server on a port."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx2
import pytest
import uvicorn
from server_fakes import ByteTokenizer

from loongjax.core.iteration import Iteration, PrefillIteration
from loongjax.engine.async_engine import AsyncEngine
from loongjax.engine.core import EngineCore
from loongjax.engine.thread import EngineThread
from loongjax_server.app import create_app
from loongjax_server.config import ServerConfig
from tests.engine.cluster import Cluster

CLUSTER = Cluster(step_s=0.01, checks=False)
"""An hour of its virtual time passes in seconds."""


def hangs_on_prefills(iteration: Iteration) -> float:
    return math.inf if isinstance(iteration, PrefillIteration) else 1.0


def hanging_core() -> EngineCore:
    return CLUSTER.core(CLUSTER.runtime(duration_s=hangs_on_prefills))


@asynccontextmanager
async def serving(engine: AsyncEngine) -> AsyncIterator[httpx2.AsyncClient]:
    await engine.start()
    app = create_app(engine, ByteTokenizer(), ServerConfig())
    config = uvicorn.Config(
        app, host="127.0.0.1", port=0, log_config=None, lifespan="on", ws="none", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20.0) as client:
            yield client
    finally:
        server.should_exit = True
        await task


async def wait_for_health(client: httpx2.AsyncClient, status: int) -> httpx2.Response:
    deadline_s = time.monotonic() + 20.0
    while (response := await client.get("/health")).status_code != status:
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.02)
    return response


def test_devices_that_never_answer_make_the_server_unhealthy(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with serving(AsyncEngine(EngineThread(hanging_core), ByteTokenizer())) as client:
            assert (await client.get("/health")).status_code == 200
            page = (await client.get("/metrics")).text
            assert 'vllm:engine_healthy{engine="0",model_name="fake"} 1.0' in page
            hung = asyncio.create_task(client.post("/v1/completions", json={"prompt": [1, 2, 3], "max_tokens": 2}))
            response = await wait_for_health(client, 503)
            message = response.json()["error"]["message"]
            assert "instances (0,) have not answered for 6" in message
            assert "iteration 0 (prefill)" in message
            page = (await client.get("/metrics")).text
            assert 'vllm:engine_healthy{engine="0",model_name="fake"} 0.0' in page
            assert "loongjax_" in page, "the step loop still tells its numbers"
            assert not hung.done(), "it may come back"
            hung.cancel()
        told = [record for record in caplog.records if record.name == "loongjax.engine.watch"]
        assert len(told) == 1

    asyncio.run(main())
