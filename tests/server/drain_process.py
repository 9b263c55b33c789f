"""Serves a fake engine in a process of its own: python drain_process.py DELAY_S DRAIN_TIMEOUT_S"""

from __future__ import annotations

import asyncio
import logging
import sys

from server_fakes import ByteTokenizer, FakeEngine

from loongjax_server.config import ServerConfig
from loongjax_server.run import serve

if __name__ == "__main__":
    delay_s, drain_timeout_s = map(float, sys.argv[1:])
    engine = FakeEngine(delay_s=delay_s)
    logging.basicConfig(level=logging.INFO)
    asyncio.run(serve(engine, ByteTokenizer(), ServerConfig(port=0, drain_timeout_s=drain_timeout_s)))
    assert engine.num_closed == 1
    assert engine.num_live == 0
    sys.stderr.write(f"closed, {engine.num_aborted} aborted\n")
