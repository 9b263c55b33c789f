"""Elastic execution against transformers: whatever a request's history, its tokens and log-probabilities are the same."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from loongjax.runtime.local import LocalRuntime
from tests.checkpoints import make_checkpoint
from tests.runtime.driver import Driver, poison_pool, small_runtime

GOLDEN = Path(__file__).parents[1] / "golden"
LOGPROB_TOLERANCE = 2e-3
CLOSE_MARGIN = 1e-3


class Golden:
    """transformers' answer for one variant."""

    def __init__(self, variant: str) -> None:
        with np.load(GOLDEN / f"{variant}.npz") as file:
            self._arrays = dict(file)

    def prompt(self, i: int) -> list[int]:
        return self._arrays[f"prompt_{i}"].tolist()

    def check(self, driver: Driver, name: str, i: int) -> None:
        """Equal greedy tokens up to the first close margin, and log-probabilities within tolerance up to there."""
        tokens = driver.tokens[name]
        greedy, margins = self._arrays[f"greedy_{i}"], self._arrays[f"margins_{i}"]
        count = min(len(tokens), len(greedy))
        close = np.flatnonzero(margins[:count] <= CLOSE_MARGIN)
        count = int(close[0]) if len(close) else count
        assert count > 0
        assert tokens[:count] == greedy[:count].tolist()
        found = [item.logprob for item in driver.logprobs[name][:count]]
        expected = self._arrays[f"greedy_logprobs_{i}"][:count]
        np.testing.assert_allclose(found, expected, rtol=0, atol=LOGPROB_TOLERANCE)
        found = [item.logprob for item in driver.prompt_logprobs[name]]
        np.testing.assert_allclose(found, self._arrays[f"prompt_logprobs_{i}"], rtol=0, atol=LOGPROB_TOLERANCE)


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("xla")


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden("gqa")


@pytest.fixture(scope="module", params=[1, 16], ids="page{}".format)
def runtime(request, tmp_path_factory, cache_dir) -> Iterator[LocalRuntime]:
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("gqa"), "gqa", with_tokenizer=False)
    runtime = small_runtime(checkpoint, cache_dir, page_size=request.param)
    yield runtime
    runtime.close()


@pytest.fixture
def driver(runtime) -> Driver:
    poison_pool(runtime)
    return Driver(runtime)


@pytest.mark.parametrize("dop", range(1, 9))
def test_every_dop_gives_the_tokens_of_transformers(driver, golden, dop):
    driver.add("r", golden.prompt(2))
    group = range(8 - dop, 8)
    first = 8 - dop
    driver.prefill(group, {"r": [(first, 0, -1)]} if dop == 1 else {"r": [(first, 0, 16), (7, 16, -1)]})
    driver.decode(group, {first: ["r"]}, steps=12)
    golden.check(driver, "r", 2)
