"""How far a variant may be from float64 truth on its own (rounded) inputs: one table for all ops."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

ABSOLUTE = {"float32": 2e-5, "float16": 2e-3, "bfloat16": 1.6e-2}
"""By input dtype. Inputs are standard normal, so outputs and log-sum-exps are of order 1."""


def assert_matches(actual: Sequence[ArrayLike], expected: Sequence[ArrayLike], dtype: str = "float32") -> None:
    """Output and log-sum-exp are those expected, -inf included."""
    for name, a, b in zip(("output", "log-sum-exp"), actual, expected, strict=True):
        a, b = np.asarray(jnp.asarray(a).astype(jnp.float32)), np.asarray(jnp.asarray(b).astype(jnp.float32))
        np.testing.assert_allclose(a, b, rtol=ABSOLUTE[dtype], atol=ABSOLUTE[dtype], err_msg=name)
