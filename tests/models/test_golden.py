"""The model against transformers' Llama, by way of the golden files."""

from pathlib import Path

import numpy as np
import pytest

from tests.checkpoints import BASE, VARIANTS, checksum, make_checkpoint, make_weights
from tests.golden.make_golden import PROMPT_LENS
from tests.models.dense import DenseLlama

GOLDEN = Path(__file__).parents[1] / "golden"
LOGPROB_TOLERANCE = 1e-4
CLOSE_MARGIN = 1e-3


def load_golden(variant: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{variant}.npz") as file:
        return dict(file)


def tps_of(variant: str) -> list[int]:
    return [tp for tp in (1, 2, 4) if (BASE | VARIANTS[variant])["num_key_value_heads"] % tp == 0]


@pytest.fixture(scope="module", params=[(variant, tp) for variant in VARIANTS for tp in tps_of(variant)], ids=str)
def case(request, tmp_path_factory) -> tuple[dict[str, np.ndarray], DenseLlama]:
    """A golden file, and the model on one of the degrees of tensor parallelism."""
    variant, tp = request.param
    checkpoint = make_checkpoint(tmp_path_factory.mktemp(variant), variant, with_tokenizer=False)
    return load_golden(variant), DenseLlama(checkpoint, tp=tp)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_checkpoints_are_those_that_the_golden_files_were_made_from(variant):
    assert checksum(make_weights(BASE | VARIANTS[variant])) == str(load_golden(variant)["checksum"])


def test_prompt_logprobs_are_those_of_transformers(case):
    golden, model = case
    for i, length in enumerate(PROMPT_LENS):
        prompt = golden[f"prompt_{i}"]
        logprobs = model.logprobs(prompt)
        found = logprobs[np.arange(length - 1), prompt[1:]]
        np.testing.assert_allclose(found, golden[f"prompt_logprobs_{i}"], rtol=0, atol=LOGPROB_TOLERANCE)
        at_positions = logprobs[golden[f"top_positions_{i}"]]
        top = np.take_along_axis(at_positions, golden[f"top_ids_{i}"], axis=-1)
        np.testing.assert_allclose(top, golden[f"top_logprobs_{i}"], rtol=0, atol=LOGPROB_TOLERANCE)


def test_greedy_tokens_are_those_of_transformers_wherever_its_margin_decides(case):
    golden, model = case
    for i, length in enumerate(PROMPT_LENS):
        greedy, margins = golden[f"greedy_{i}"], golden[f"margins_{i}"]
        close = np.flatnonzero(margins <= CLOSE_MARGIN)
        num_compared = int(close[0]) if len(close) else len(greedy)
        # Each greedy token follows from those before it, so one pass over the whole sequence checks them all.
        logprobs = model.logprobs(np.concatenate([golden[f"prompt_{i}"], greedy[:-1]]))[length - 1 :]
        assert logprobs.argmax(axis=-1)[:num_compared].tolist() == greedy[:num_compared].tolist()
        found = np.take_along_axis(logprobs, greedy[:, None], axis=-1)[:, 0]
        np.testing.assert_allclose(found, golden[f"greedy_logprobs_{i}"], rtol=0, atol=LOGPROB_TOLERANCE)


@pytest.mark.parametrize("variant", ["gqa", "rope_yarn", "tied"])
def test_bfloat16_stays_near_float32_when_teacher_forced(variant, tmp_path):
    golden = load_golden(variant)
    make_checkpoint(tmp_path, variant, dtype="bfloat16", with_tokenizer=False)
    model, reference = (DenseLlama(tmp_path, dtype=dtype) for dtype in ("bfloat16", "float32"))
    differences = []
    for i, length in enumerate(PROMPT_LENS):
        sequence = np.concatenate([golden[f"prompt_{i}"], golden[f"greedy_{i}"]])
        found, expected = (
            np.take_along_axis(llama.logprobs(sequence)[:-1], sequence[1:, None], axis=-1)[length - 1 :]
            for llama in (model, reference)
        )
        differences.append(np.abs(found - expected))
    assert np.concatenate(differences).mean() < 0.02
    assert np.concatenate(differences).max() < 0.2
