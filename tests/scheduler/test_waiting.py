"""Waiting requests in numbers."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from loongjax.core.request import ServiceLevel
from loongjax.scheduler.waiting import NUM_COLUMNS, TTFT_S, Waiting
from tests.scheduler.views import waiting


def test_the_table_says_what_the_requests_do() -> None:
    wishing = waiting("b", 7, 12, arrival_s=1.5, priority=-2, slo=ServiceLevel(ttft_s=3.0), is_suspect=True)
    queue = Waiting([waiting("a", 0, 5, keeps_kv=False, max_total_tokens=9), wishing])
    assert queue.table.T.tolist() == [
        [5.0, 9.0, 0.0, 0.0, 0.0, 0.0, 0.0, math.inf],
        [12.0, 112.0, 0.0, 1.0, 1.0, -2.0, 1.5, 3.0],
    ]


def test_nobody_wishes_for_a_first_token_that_has_come() -> None:
    request = dataclasses.replace(waiting("a", 0, 5, slo=ServiceLevel(ttft_s=3.0)), num_output_tokens=1)
    assert Waiting([request]).table[TTFT_S, 0] == math.inf


def test_nobody_waits() -> None:
    assert Waiting().table.shape == (NUM_COLUMNS, 0)


def test_a_table_that_is_known_is_not_made_again() -> None:
    requests = [waiting("a", 0, 5)]
    table = np.ones((NUM_COLUMNS, 1))
    assert Waiting.with_table(requests, table).table is table
    assert Waiting.with_table(requests, table) == Waiting(requests) == tuple(requests)
