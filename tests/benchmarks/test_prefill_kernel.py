"""What the benchmark of prefill_attention runs, with plain jax in the place of the kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import prefill_kernel
from benchmarks.prefill_kernel import NUM_CHECKED_ROWS, Program, Timer, make_work, random_inputs, with_dense
from loongjax.pallas_kernels.prefill_attention.reference import reference_prefill_attention


def attend(work, calls: list[None]):
    """Attention that is counted each time it runs."""

    def counted(q, k, v):
        jax.debug.callback(lambda: calls.append(None))
        ranges = map(jnp.asarray, work.ranges)
        settings = {"sm_scale": prefill_kernel.SM_SCALE, "out_dtype": np.dtype(q.dtype)}
        return reference_prefill_attention(q, k, v, *ranges, **settings)

    return counted


@pytest.mark.parametrize("num_repetitions", [1, 5])
def test_a_program_runs_the_op_as_often_as_it_says(num_repetitions, monkeypatch):
    work = make_work("causal", 64, "4/2")
    monkeypatch.setattr(prefill_kernel, "PROGRAM_S", num_repetitions * work.flops / 600e12)
    calls: list[None] = []
    program = Program(attend(work, calls), work)
    assert program.repeats == num_repetitions
    rows = jnp.arange(NUM_CHECKED_ROWS, dtype=jnp.int32)
    token, *_ = program.run(jnp.float32(0), *random_inputs(work), rows)
    token.block_until_ready()
    jax.effects_barrier()
    assert len(calls) == num_repetitions


def test_a_timer_compares_the_rows_that_its_program_gives_back(monkeypatch):
    work = make_work("causal", 64, "4/2")
    monkeypatch.setattr(prefill_kernel, "PROGRAM_S", 0.0)
    rows = np.linspace(0, 63, NUM_CHECKED_ROWS, dtype=np.int32)
    inputs = random_inputs(work)
    truth = prefill_kernel.reference_rows(work, inputs, rows)
    timer = Timer(Program(attend(work, []), work), work, inputs, rows)
    timer.check(truth)
    timer.sample()
    assert timer.numbers["difference"] < 0.01  # of bfloat16
    assert timer.numbers["lse_difference"] < 1e-5
    wrong = Timer(Program(attend(work, []), work), work, inputs, rows)
    wrong.check([truth[0] + 1.0, truth[1]])
    wrong.sample()
    assert wrong.numbers["difference"] > 0.9


def test_before_a_mix_goes_a_causal_mask_over_as_many_tokens_unless_there_is_one():
    works = [make_work(mask, length, "8/2") for mask, length in [("full", 64), ("64x1K", 0), ("zipf", 0)]]
    masks = [(work.mask, work.num_tokens) for work in with_dense(works)]
    assert masks == [("full", 64), ("causal", 65_536), ("64x1K", 65_536), ("zipf", 65_536)]
    dense = make_work("causal", 65_536, "8/2")
    assert [work.mask for work in with_dense([dense, *works])] == ["causal", "full", "64x1K", "zipf"]
