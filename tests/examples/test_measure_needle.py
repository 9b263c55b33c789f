"""What the measuring script says if it cannot measure."""

from __future__ import annotations

import http.server
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

import measure_needle


@pytest.fixture
def refusing_server() -> Iterator[str]:
    """The address of a server to which every prompt is too long."""

    class Handler(http.server.BaseHTTPRequestHandler):
        error: ClassVar[bytes] = b'{"error": {"message": "Please shorten the prompt"}}'

        def do_POST(self) -> None:
            self.send_response(400)
            self.send_header("Content-Length", str(len(self.error)))
            self.end_headers()
            self.wfile.write(self.error)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def outcome(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str | int | None:
    """What the script exits with."""
    monkeypatch.setattr(sys, "argv", ["measure_needle.py", "--lengths", "64", "--num-keys", "2", *arguments])
    with pytest.raises(SystemExit) as caught:
        measure_needle.main()
    return caught.value.code


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("--lengths", "63", "must be at least 64, got 63"),
        ("--num-keys", "0", "must be at least 1, got 0"),
        ("--concurrency", "0", "must be at least 1, got 0"),
        ("--tokenizer", "no/such.json", "there is no no/such.json"),
        ("--out", "no/folder/out.json", "no/folder/out.json is no file in a folder that exists"),
    ],
)
def test_an_argument_that_cannot_work_is_a_usage_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, value: str, complaint: str
) -> None:
    assert outcome(monkeypatch, name, value) == 2
    assert f"argument {name}: {complaint}" in capsys.readouterr().err


def test_without_a_server_it_says_how_to_start_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        message = outcome(monkeypatch, "--base-url", url, "--out", str(tmp_path / "out.json"))
    assert isinstance(message, str)
    assert message.startswith(f"nobody answers at --base-url {url} (")
    assert "start `loongjax serve` first" in message
    assert not (tmp_path / "out.json").exists()


def test_an_address_that_is_none_is_told_likewise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert str(outcome(monkeypatch, "--base-url", "localhost:8000")).startswith("nobody answers at --base-url local")


def test_a_refusal_is_passed_on(monkeypatch: pytest.MonkeyPatch, refusing_server: str) -> None:
    message = str(outcome(monkeypatch, "--base-url", refusing_server))
    assert message == f"{refusing_server} answers 400: " + '{"error": {"message": "Please shorten the prompt"}}'
