"""Rivals of prefill attention: which there are, and what is made of what they return."""

import dataclasses
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loongjax_profiling.kernels.rivals import RIVALS, installed_rivals, tokamax_attention


def test_a_rival_that_is_not_installed_is_named_and_left_out(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tokamax", None)
    assert list(installed_rivals()) == ["cudnn"]
    assert "without tokamax: ModuleNotFoundError" in capsys.readouterr().out


@dataclasses.dataclass(frozen=True)
class TokamaxConfig:
    num_stages: int = 9
    persistent: bool = True


@dataclasses.dataclass(frozen=True)
class DenseTokamax:
    """The residuals of tokamax's op are the maximum and the sum of exponentials, [B, N, T] both."""

    config: TokamaxConfig | None = None

    def bind(self, *operands, **settings):
        return types.SimpleNamespace(heuristics_config=TokamaxConfig())

    def __call__(self, q, k, v, *, is_causal, return_residuals):
        assert is_causal
        assert return_residuals
        assert self.config is not None
        assert not self.config.persistent
        scores = jnp.einsum("btnh,bsnh->bnts", q, k) / self.config.num_stages
        maximum = scores.max(axis=-1)
        total = jnp.exp(scores - maximum[..., None]).sum(axis=-1)
        return v, (maximum, total)


@pytest.fixture
def fake_tokamax(monkeypatch):
    gpu = types.ModuleType("tokamax.ops.gpu")
    gpu.__dict__["PallasMosaicFlashAttention"] = DenseTokamax
    for name in ("tokamax", "tokamax.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "tokamax.ops.gpu", gpu)


def test_what_is_installed_is_a_rival(fake_tokamax):
    assert installed_rivals() == RIVALS


def test_residuals_of_tokamax_make_a_log_sum_exp_of_each_token_and_head(fake_tokamax):
    q, k, v = (jax.random.normal(jax.random.key(seed), (2, 5, 3, 4)) for seed in range(3))
    o, lse = tokamax_attention(q, k, v, is_causal=True, num_stages=2)
    scores = np.einsum("btnh,bsnh->btns", *(np.asarray(x, np.float64) for x in (q, k))) / 2
    np.testing.assert_allclose(lse, np.log(np.exp(scores).sum(axis=-1)), rtol=1e-5)
    np.testing.assert_array_equal(o, v)
