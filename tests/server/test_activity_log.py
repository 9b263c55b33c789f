"""What an operator reads in the log while the engine works."""

from __future__ import annotations

import asyncio
import dataclasses
import logging

from server_client import wait_until
from server_fakes import FakeEngine

from loongjax.engine.client import EngineStats
from loongjax_server import activity_log
from loongjax_server.activity_log import describe_activity, logged_activity

BEFORE = EngineStats(
    kv_slots=(100, 100),
    kv_slots_used=(0, 0),
    prefill_dop={4: 10},
    decode_dop={1: 100},
    num_prompt_tokens=1000,
    num_generation_tokens=500,
    num_iterations=110,
)
AFTER = EngineStats(
    num_requests_running=3,
    num_requests_waiting=2,
    kv_slots=(100, 100),
    kv_slots_used=(50, 25),
    prefill_dop={4: 11, 1: 1},
    decode_dop={1: 100, 2: 20, 3: 20},
    num_prompt_tokens=6120,
    num_generation_tokens=600,
    num_iterations=152,
)


def test_the_line_tells_rates_and_means_of_the_interval_and_not_of_all_time():
    assert describe_activity(BEFORE, AFTER, 10.0) == (
        "3 running, 2 waiting; 512.0 prompt and 10.0 output tokens/s; KV pool 37.5 % used; "
        "mean DoP 2.50 of prefills, 2.50 of decodes"
    )


def test_an_idle_engine_has_no_line():
    assert describe_activity(BEFORE, BEFORE, 10.0) is None


def test_work_that_is_over_already_has_a_line():
    over = dataclasses.replace(AFTER, num_requests_running=0, num_requests_waiting=0)
    assert describe_activity(BEFORE, over, 10.0) is not None


def test_requests_that_do_not_move_have_a_line_without_a_mean():
    stuck = dataclasses.replace(BEFORE, num_requests_waiting=1)
    line = describe_activity(BEFORE, stuck, 10.0)
    assert line is not None
    assert "mean DoP - of prefills, - of decodes" in line


def lines_of(caplog, level: int) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == level]


def test_lines_come_while_the_engine_is_busy_and_only_then(caplog):
    caplog.set_level(logging.INFO, activity_log.__name__)
    engine = FakeEngine()

    async def work() -> None:
        async with logged_activity(engine, interval_s=0.01):
            await asyncio.sleep(0.1)
            assert not caplog.records
            engine.engine_stats = AFTER
            await asyncio.sleep(0.1)
            assert len(lines_of(caplog, logging.INFO)) > 1
            engine.engine_stats = dataclasses.replace(AFTER, num_requests_running=0, num_requests_waiting=0)
            await asyncio.sleep(0.05)
            num_lines = len(caplog.records)
            await asyncio.sleep(0.1)
            assert len(caplog.records) == num_lines

    asyncio.run(work())


def test_a_dead_engine_is_told_once(caplog):
    engine = FakeEngine()
    engine.is_dead = True

    async def work() -> None:
        async with logged_activity(engine, interval_s=0.01):
            await asyncio.sleep(0.1)

    asyncio.run(work())
    assert lines_of(caplog, logging.ERROR) == ["the engine is dead: the engine is dead"]


def test_a_wedged_engine_is_warned_of(caplog, monkeypatch):
    monkeypatch.setattr(activity_log, "ANSWER_TIMEOUT_S", 0.01)
    engine = FakeEngine()
    engine.is_wedged = True

    async def work() -> None:
        async with logged_activity(engine, interval_s=0.01):
            await asyncio.sleep(0.2)

    asyncio.run(work())
    assert lines_of(caplog, logging.WARNING)[0] == "the engine gave no statistics: no answer within 0.01 s"


def test_a_server_logs_its_engines_activity(serve, caplog, monkeypatch):
    monkeypatch.setattr(activity_log, "INTERVAL_S", 0.01)
    caplog.set_level(logging.INFO, activity_log.__name__)
    server = serve(FakeEngine())
    server.engine.engine_stats = AFTER
    wait_until(lambda: any("3 running" in line for line in lines_of(caplog, logging.INFO)))
