"""`loongjax serve` with an engine that never finishes loading: says the id of the process that loads, then waits."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from server_fakes import ByteTokenizer

from loongjax import cli
from loongjax_server import launch


class SlowFactory:
    """Takes a CoreFactory's place; built in this process, called in the one that loads."""

    def __init__(self, *settings: Any) -> None:
        pass

    def __call__(self) -> None:
        sys.stderr.write(f"loading in {os.getpid()}\n")
        sys.stderr.flush()
        time.sleep(60)


if __name__ == "__main__":
    launch.__dict__.update(
        CoreFactory=SlowFactory,
        load_tokenizer=lambda folder: ByteTokenizer(),
        resolve_checkpoint=lambda checkpoint: checkpoint,
    )
    sys.exit(cli.main(["serve", "--port", "0"]))
