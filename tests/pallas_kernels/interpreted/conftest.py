"""Collected only where Triton interprets; see test_triton_bodies.py."""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
