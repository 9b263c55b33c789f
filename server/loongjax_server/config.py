"""What an operator may set of the HTTP server."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from loongjax.errors import ConfigError

API_KEY_VARIABLE = "LOONGJAX_API_KEY"
"""Environment variable that holds the API key when the configuration names none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Settings of the HTTP server; those of the engine are elsewhere.

    Raises:
        ConfigError: a value that cannot work.
    """

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for every interface."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    served_model_name: str | None = None
    """The model's name in requests and responses; None: the checkpoint's name."""
    api_key: str | None = None
    """Bearer token that clients must send; None: the variable LOONGJAX_API_KEY, and if that is unset, no key."""
    chat_template: Path | None = None
    """Jinja file used in place of the tokenizer's own chat template."""
    root_path: str = ""
    """Path prefix that a proxy in front strips."""
    drain_timeout_s: float = 30.0
    """After SIGTERM, how long live requests may take to finish, in seconds."""
    keep_alive_timeout_s: int = 75
    """How long an idle connection stays open, in seconds; above the pool timeouts of common clients."""
    health_timeout_s: float = 10.0
    """How long the step loop may take to answer before /health says 503, in seconds."""
    metrics_timeout_s: float = 2.0
    """How long it may take before /metrics is served without its numbers, in seconds; well below a scraper's limit."""
    max_body_bytes: int = 64 * 2**20
    """Largest request body, in bytes; larger ones get a 413."""
    max_num_choices: int = 4096
    """Most samples one HTTP request may ask for: prompts times n."""
    max_num_concurrent_choices: int = 64
    """Samples of one HTTP request that the engine has at the same time, one prompt's at least; the others follow."""
    num_tokenizer_threads: int = 2
    """Threads that tokenize, render chat templates and parse large bodies."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe messages that are logged."""
    access_log: bool = False
    """Log every HTTP request."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port must be from 0 to 65535, got {self.port}: 0 takes a free one")
        for name in ("max_body_bytes", "max_num_choices", "max_num_concurrent_choices", "num_tokenizer_threads"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"{_flag(name)} must be at least 1, got {value}: raise it, or leave it out")
        for name in ("drain_timeout_s", "keep_alive_timeout_s", "health_timeout_s", "metrics_timeout_s"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ConfigError(
                    f"{_flag(name)} must be finite and not negative, got {value}: give seconds, or leave it out"
                )
        if self.root_path and not self.root_path.startswith("/"):
            raise ConfigError(
                f"--root-path must start with a slash, got {self.root_path!r}: try {'/' + self.root_path!r}"
            )
        if self.api_key is not None:
            _check_api_key("--api-key", self.api_key)

    def check_outside(self) -> None:
        """Reads what the settings refer to, so that it is told before a model is loaded.

        Raises:
            ConfigError: a chat template that cannot be read or compiled, or a variable that cannot be an API key.
        """
        self.read_chat_template()
        self.resolve_api_key()

    def resolve_api_key(self, environ: Mapping[str, str] = os.environ) -> str | None:
        """The key that clients must send, or None if none is needed.

        Raises:
            ConfigError: the variable is set, but holds no key.
        """
        if self.api_key is not None:
            return self.api_key
        key = environ.get(API_KEY_VARIABLE)
        if key is not None:
            _check_api_key(API_KEY_VARIABLE, key)
        return key

    def read_chat_template(self) -> str | None:
        """The text of `chat_template`, or None if it names no file.

        Raises:
            ConfigError: a file that cannot be read, or that is no Jinja template.
        """
        if self.chat_template is None:
            return None
        from loongjax_server.chat_template import check_chat_template  # here: `--help` needs no Jinja

        try:
            template = self.chat_template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"--chat-template {self.chat_template} cannot be read ({error}): give the path of a UTF-8 text file"
            ) from error
        check_chat_template(f"--chat-template {self.chat_template}", template)
        return template


def _check_api_key(source: str, key: str) -> None:
    # An empty key is most often a secret that did not arrive: serving without one would open the server to everybody.
    if not key:
        raise ConfigError(f"{source} is empty: give a key, or leave it out (unset) to serve without one")
    if key != key.strip():
        raise ConfigError(f"{source} begins or ends with white space, which no client can send: leave that out")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
