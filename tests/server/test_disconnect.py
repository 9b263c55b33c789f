"""A client that goes away frees what it held, promptly, and harms nobody."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import socket
import struct

import pytest
from server_client import RunningServer, wait_until
from server_fakes import SCRIPT, FakeEngine

PROMPTLY_S = 2.0


def request_bytes(path: str = "/v1/completions", **fields) -> bytes:
    body = json.dumps({"prompt": "a", "messages": [{"role": "user", "content": "a"}], **fields}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def open_request(server: RunningServer, data: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    connection.sendall(data)
    return connection


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("abruptly", [False, True])
def test_a_client_that_leaves_aborts_its_request(serve, path, stream, abruptly):
    engine = FakeEngine(delay_s=0.01)
    server = serve(engine)
    connection = open_request(server, request_bytes(path, stream=stream, max_tokens=4000))
    wait_until(lambda: engine.num_live == 1)
    if stream:
        connection.recv(100)
    if abruptly:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
    wait_until(lambda: engine.num_live == 0, PROMPTLY_S)
    assert engine.num_aborted == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_before_the_first_token_aborts_its_request(serve, stream):
    engine = FakeEngine()
    engine.first_token = asyncio.Event()
    server = serve(engine)
    connection = open_request(server, request_bytes(stream=stream))
    wait_until(lambda: engine.num_live == 1)
    connection.close()
    wait_until(lambda: engine.num_live == 0, PROMPTLY_S)


@pytest.mark.parametrize("stream", [False, True])
def test_all_prompts_and_samples_of_a_request_are_aborted(serve, stream):
    engine = FakeEngine(delay_s=0.01)
    server = serve(engine, max_num_concurrent_choices=12)
    data = request_bytes(prompt=["x"] * 10, n=3, stream=stream, max_tokens=4000)
    connection = open_request(server, data)
    wait_until(lambda: engine.num_live == 4)
    connection.close()
    wait_until(lambda: engine.num_live == 0, PROMPTLY_S)
    assert engine.num_aborted == 4
    assert len(engine.calls) == 4


def test_a_body_that_never_ends_reaches_no_engine(server: RunningServer):
    connection = open_request(server, request_bytes()[:-5])
    connection.close()
    assert server.post("/v1/completions", {"prompt": "a"}).status == 200
    assert len(server.engine.calls) == 1


def test_a_disconnect_is_logged_as_499(serve, caplog):
    engine = FakeEngine(delay_s=0.01)
    server = serve(engine)
    with caplog.at_level(logging.INFO, logger="loongjax_server"):
        connection = open_request(server, request_bytes(stream=True, max_tokens=4000, request_id="gone"))
        connection.recv(100)
        connection.close()
        wait_until(lambda: "request gone: 499" in caplog.text)
    assert "vllm:request_success_total" in server.get("/metrics").body.decode()
    assert 'finished_reason="abort",model_name="tiny-llama"} 1.0' in server.get("/metrics").body.decode()


async def read_stream(port: int, leave_after: int | None) -> bytes:
    """Reads a stream to its end, or leaves after some bytes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request_bytes(stream=True, max_tokens=40))
    await writer.drain()
    received = b""
    while b"[DONE]" not in received and (leave_after is None or len(received) < leave_after):
        chunk = await reader.read(1024)
        assert chunk
        received += chunk
    writer.close()
    await writer.wait_closed()
    return received


def test_of_200_streams_with_random_disconnects_none_is_left(serve):
    engine = FakeEngine(delay_s=0.005)
    server = serve(engine)
    chance = random.Random(0)
    stays = [chance.random() < 0.5 for _ in range(200)]

    async def main() -> list[bytes]:
        return await asyncio.gather(
            *(read_stream(server.port, None if stay else chance.randrange(1, 4000)) for stay in stays)
        )

    received = asyncio.run(main())
    wait_until(lambda: engine.num_live == 0, PROMPTLY_S)
    assert len(engine.calls) == 200
    assert engine.num_aborted > 50
    text = "".join(SCRIPT[i % len(SCRIPT)] for i in range(40))
    for stay, data in zip(stays, received, strict=True):
        if stay:
            blocks = [block for block in data.replace(b"\r\n", b"\n").split(b"\n") if block.startswith(b"data: {")]
            assert "".join(json.loads(block[6:])["choices"][0]["text"] for block in blocks) == text
    assert server.get("/health").status == 200
