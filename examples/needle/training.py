"""One optimizer step on the answers, and a little on the prose."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from needle.initial import init_params
from needle.model import Attend, ModelConfig, Params, hidden_states, logits
from needle.rows import ANSWER, PROSE, Batch

PROSE_WEIGHT = 0.1
"""Enough for the model to write sentences; the answers are what it is for."""


class Trainer:
    """Float32 parameters and AdamW's state; computes in `compute_dtype`."""

    def __init__(self, config: ModelConfig, seed: int, attend: Attend, compute_dtype: str) -> None:
        self.params = init_params(config, seed)
        self._opt_state = optimizer().init(self.params)
        self._step = functools.partial(train_step, config=config, attend=attend, compute_dtype=compute_dtype)

    def step(self, batch: Batch, learning_rate: float) -> dict[str, Array]:
        """Updates the parameters; returns `loss`'s metrics, not waited for."""
        self.params, self._opt_state, metrics = self._step(self.params, self._opt_state, batch, learning_rate)
        return metrics


def optimizer() -> optax.GradientTransformation:
    """AdamW on clipped gradients but for the learning rate, which the caller multiplies in."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b2=0.98),
        optax.add_decayed_weights(0.02, mask=lambda params: jax.tree.map(lambda value: value.ndim > 1, params)),
    )


@functools.partial(
    jax.jit, static_argnames=("config", "attend", "compute_dtype"), donate_argnames=("params", "opt_state")
)
def train_step(
    params: Params,
    opt_state: optax.OptState,
    batch: Batch,
    learning_rate: Float[Array, ""] | float,
    config: ModelConfig,
    attend: Attend,
    compute_dtype: str,
) -> tuple[Params, optax.OptState, dict[str, Array]]:
    """One step; donates parameters and optimizer state. A step whose gradient is not finite changes nothing."""
    loss_of = functools.partial(loss, batch=batch, config=config, attend=attend, compute_dtype=compute_dtype)
    gradients, metrics = jax.grad(loss_of, has_aux=True)(params)
    updates, new_opt_state = optimizer().update(gradients, opt_state, params)
    new_params = jax.tree.map(lambda value, update: value - learning_rate * update, params, updates)
    is_finite = jnp.isfinite(sum(jnp.vdot(gradient, gradient) for gradient in jax.tree.leaves(gradients)))
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(is_finite, new, old), (new_params, new_opt_state), (params, opt_state)
    )
    return params, opt_state, metrics


def loss(
    params: Params, batch: Batch, config: ModelConfig, attend: Attend, compute_dtype: str
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Mean cross-entropy of the answer tokens plus `PROSE_WEIGHT` times that of all others, and metrics.

    The first digit is the one that takes a lookup; the others can be found by the digits before them.
    """
    cast = {name: value.astype(compute_dtype) for name, value in params.items()}
    scores_BTV = logits(cast, hidden_states(cast, config, batch.tokens[:, :-1], batch.positions[:, :-1], attend))
    targets_BT, kinds_BT = batch.tokens[:, 1:], batch.kinds[:, 1:]
    losses_BT = optax.softmax_cross_entropy_with_integer_labels(scores_BTV, targets_BT)
    is_right_BT = (scores_BTV.argmax(axis=-1) == targets_BT).astype(jnp.float32)
    is_answer_BT = kinds_BT == ANSWER
    begins_BT = is_answer_BT & (jnp.roll(kinds_BT, 1, axis=1) != ANSWER)
    answer_loss, prose_loss = _mean(losses_BT, is_answer_BT), _mean(losses_BT, kinds_BT == PROSE)
    metrics = {
        "answer_loss": answer_loss,
        "prose_loss": prose_loss,
        "tokens_right": _mean(is_right_BT, is_answer_BT),
        "first_digits_right": _mean(is_right_BT, jnp.roll(begins_BT, 1, axis=1)),
    }
    return answer_loss + PROSE_WEIGHT * prose_loss, metrics


def _mean(values: Float[Array, "B T"], where: Bool[Array, "B T"]) -> Float[Array, ""]:
    return jnp.where(where, values, 0.0).sum() / jnp.maximum(where.sum(), 1).astype(values.dtype)
