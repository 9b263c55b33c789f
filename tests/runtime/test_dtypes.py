"""Half precision on elastic groups, teacher-forced: log-probabilities near those of float32, whatever is converted."""

from pathlib import Path

import numpy as np
import pytest

from tests.checkpoints import make_checkpoint
from tests.runtime.driver import GREEDY, Driver, Golden, small_runtime

VARIANT = "gqa_deep"


def prompt_logprobs(checkpoint: Path, cache_dir: Path, dtype: str) -> np.ndarray:
    """Of a whole golden sequence, prefilled by three instances and kept by two."""
    golden = Golden(VARIANT)
    runtime = small_runtime(checkpoint, cache_dir, dtype=dtype)
    driver = Driver(runtime)
    driver.add("r", golden.prompt(4), GREEDY)
    driver.prefill((1, 2, 5), {"r": [(2, 0, 64), (5, 64, -1)]})
    driver.decode((2, 5), {5: ["r"]}, steps=3)
    runtime.close()
    assert len(driver.tokens["r"]) == 4
    return np.array([item.logprob for item in driver.prompt_logprobs["r"]])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_near_float32_when_teacher_forced(dtype, tmp_path, cache_dir):
    checkpoint = make_checkpoint(tmp_path, VARIANT, dtype=dtype, with_tokenizer=False)
    found = prompt_logprobs(checkpoint, cache_dir, "auto")
    difference = np.abs(found - prompt_logprobs(checkpoint, cache_dir, "float32"))
    assert 0.0 < difference.mean() <= 0.02
    assert difference.max() <= 0.2
