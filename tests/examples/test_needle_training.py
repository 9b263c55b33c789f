"""The optimizer's step and the schedule of stages."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train_needle
from needle.model import ModelConfig, plain_attention
from needle.rows import ANSWER, PAD, PROSE, Batch
from needle.training import PROSE_WEIGHT, Trainer, loss
from train_needle import Stage, schedule

CONFIG = ModelConfig(num_layers=2, hidden_size=32, intermediate_size=16, head_dim=8, vocab_size=32)


def test_a_folder_that_cannot_be_made_is_told_before_any_work(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["train_needle.py", "--out", str(tmp_path / "file")])
    with pytest.raises(SystemExit, match="file is no folder and cannot be made one"):
        train_needle.main()


@pytest.fixture
def batch() -> Batch:
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(2, 32, (2, 17)), jnp.int32)
    kinds = jnp.asarray(np.where(np.arange(17) < 10, PROSE, np.where(np.arange(17) < 14, ANSWER, PAD)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(17)[None], tokens.shape)
    return Batch(tokens=tokens, kinds=jnp.broadcast_to(kinds[None], tokens.shape), positions=positions)


def loss_of(params, batch):
    return loss(params, batch, config=CONFIG, attend=plain_attention, compute_dtype="float32")


@pytest.fixture(autouse=True)
def _optax_promotes_dtypes():
    with jax.numpy_dtype_promotion("standard"):
        yield


def trainer() -> Trainer:
    return Trainer(CONFIG, 0, plain_attention, compute_dtype="float32")


def test_steps_on_one_batch_learn_it(batch):
    model = trainer()
    before, _ = loss_of(model.params, batch)
    for _ in range(60):
        model.step(batch, 1e-2)
    _, metrics = loss_of(model.params, batch)
    assert metrics["answer_loss"] < 0.5 * before
    assert metrics["tokens_right"] > 0.7


def test_padding_has_no_part_in_the_loss(batch):
    params = trainer().params
    other = batch._replace(tokens=batch.tokens.at[:, 14:].set(5))
    np.testing.assert_allclose(loss_of(params, batch)[0], loss_of(params, other)[0], rtol=1e-6)


def test_the_loss_is_that_of_answers_and_a_little_of_prose(batch):
    params = trainer().params
    total, metrics = loss_of(params, batch)
    np.testing.assert_allclose(total, metrics["answer_loss"] + PROSE_WEIGHT * metrics["prose_loss"], rtol=1e-6)


def test_the_first_digit_is_the_second_token_of_an_answer(batch):
    model = trainer()
    embedding = model.params["model.embed_tokens.weight"]
    params = model.params | {"model.embed_tokens.weight": jnp.zeros_like(embedding).at[:, 0].set(1.0)}
    tokens = batch.tokens.at[:, 11].set(0)  # equal scores: the most likely token is 0
    _, metrics = loss_of(params, batch._replace(tokens=tokens))
    assert metrics["first_digits_right"] == 1.0
    assert metrics["tokens_right"] == pytest.approx(1 / 4)


def test_a_gradient_that_is_not_finite_changes_nothing(batch):
    model = trainer()
    params = model.params | {"model.norm.weight": jnp.full(32, jnp.nan)}
    model.params = jax.tree.map(jnp.copy, params)
    model.step(batch, 1e-2)
    for name, value in params.items():
        np.testing.assert_array_equal(model.params[name], value)


def test_the_rate_falls_from_stage_to_stage_and_then_to_zero():
    stages = [Stage.parse("256:4:2e-3"), Stage.parse("1024:2:1e-3")]
    steps = list(schedule(stages))
    assert [length for length, _ in steps] == [256] * 4 + [1024] * 2
    np.testing.assert_allclose([rate for _, rate in steps], [2e-3, 1.75e-3, 1.5e-3, 1.25e-3, 1e-3, 0.5e-3])


@pytest.mark.parametrize("argument", ["256", "256:4", "a:4:1e-3"])
def test_a_stage_that_cannot_be_read_is_refused(argument):
    with pytest.raises(ValueError, match=r".+"):
        Stage.parse(argument)
