"""Ring attention on meshes of many sizes, and decode over what devices kept."""

import functools
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ring_on_changing_mesh as example
from loongjax.pallas_kernels.decode_attention import api as decode_api
from loongjax.pallas_kernels.kv_update import api as kv_update_api
from loongjax.pallas_kernels.prefill_attention import api as prefill_api
from tests.pallas_kernels.brute_force import attend_row, attend_sequences

SCRIPT = Path(example.__file__)
PROMPT_LENS = [7, 1, 4, 12]


@pytest.fixture(scope="module")
def batch() -> example.Batch:
    return example.random_batch(PROMPT_LENS, "float32")


def after_each_prompt(batch: example.Batch) -> np.ndarray:
    """Brute-force outputs of the next tokens."""
    ends = np.cumsum(batch.prompt_lens)
    spans = [slice(end - length, end) for end, length in zip(ends, batch.prompt_lens, strict=True)]
    pairs = zip(batch.next_q, spans, strict=True)
    return np.array([attend_row(q, batch.k[span], batch.v[span])[0] for q, span in pairs])


def run_script(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=300)


def test_the_script_prints_a_row_for_each_size_and_succeeds():
    finished = run_script("--prompt-lens", "30", "1", "17", "--sizes", "1", "3")
    assert finished.returncode == 0, finished.stderr
    title, _, _, *rows = finished.stdout.splitlines()
    assert title == "48 tokens of 3 prompts, float32, cpu"
    table = np.array([row.split() for row in rows], float)
    np.testing.assert_array_equal(table[:, :2], [[1, 1], [3, 2]])
    assert (table[:, 2:4] > 0).all()
    assert (table[:, 4:] < 1e-4).all()


@pytest.mark.parametrize("arguments", [["--prompt-lens", "0", "5"], ["--prompt-lens", "5", "-1"]])
def test_an_argument_that_cannot_work_is_a_usage_error(monkeypatch, capsys, arguments):
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, *arguments])
    with pytest.raises(SystemExit) as caught:
        example.main()
    assert caught.value.code == 2
    assert f"argument {arguments[0]}: must be at least 1, got" in capsys.readouterr().err


def test_all_default_sizes_run_in_bfloat16(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, "--prompt-lens", "9", "3", "--dtype", "bfloat16"])
    example.main()
    assert [row.split()[0] for row in capsys.readouterr().out.splitlines()[3:]] == ["1", "2", "3", "5", "8"]


@pytest.mark.parametrize("wrong", [2e-4, np.nan])
@pytest.mark.parametrize("which", [0, 1])
def test_a_difference_above_the_tolerance_fails_with_its_size(monkeypatch, wrong, which):
    right = example.dense_outputs

    def off_by_a_little(batch):
        outputs = right(batch)
        outputs[which][-1, 0, 0] += wrong
        return outputs

    monkeypatch.setattr(example, "dense_outputs", off_by_a_little)
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, "--prompt-lens", "9", "3", "--sizes", "1", "2"])
    with pytest.raises(SystemExit, match=r"from dense attention, which is more than 0\.0001"):
        example.main()


@pytest.mark.parametrize("size", ["0", "9"])
def test_a_mesh_of_devices_that_are_not_there_is_refused(monkeypatch, size):
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, "--prompt-lens", "2", "--sizes", size])
    with pytest.raises(SystemExit, match=f"A mesh of {size} devices, where 8 are"):
        example.main()


def test_dense_outputs_equal_brute_force(batch):
    prompts, next_tokens = example.dense_outputs(batch)
    expected, _ = attend_sequences(batch.q, batch.k, batch.v, PROMPT_LENS)
    np.testing.assert_allclose(prompts, expected, atol=2e-5, rtol=2e-5)
    np.testing.assert_allclose(next_tokens, after_each_prompt(batch), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("num_devices", range(1, 9))
def test_chosen_intervals_cover_every_token_once_on_half_of_the_devices(num_devices):
    intervals = example.choose_intervals(101, num_devices)
    assert len(intervals) == num_devices
    assert [token for start, end in intervals for token in range(start, end)] == list(range(101))
    assert sum(start < end for start, end in intervals) == (num_devices + 1) // 2


@pytest.mark.parametrize(
    "intervals",
    [[(0, 0), (0, 24), (0, 0)], [(20, 24), (0, 3), (3, 20)], [(0, 24)]],
    ids=["all on one", "in another order", "one device"],
)
def test_any_intervals_that_cover_the_keys_give_the_same(batch, intervals):
    prompts, next_tokens, *_ = example.run(batch, example.mesh_of(len(intervals)), intervals)
    expected, _ = attend_sequences(batch.q, batch.k, batch.v, PROMPT_LENS)
    np.testing.assert_allclose(prompts, expected, atol=2e-5, rtol=2e-5)
    np.testing.assert_allclose(next_tokens, after_each_prompt(batch), atol=2e-5, rtol=2e-5)


def test_a_key_that_nobody_keeps_is_missed_by_the_next_token_of_its_prompt_alone(batch):
    _, next_tokens, *_ = example.run(batch, example.mesh_of(2), [(0, 9), (10, 24)])
    differences = np.abs(next_tokens - after_each_prompt(batch)).max(axis=(1, 2))
    assert differences[2] > 100 * example.TOLERANCE["float32"]
    assert (np.delete(differences, 2) < example.TOLERANCE["float32"]).all()


def test_a_key_kept_twice_counts_twice(batch):
    _, next_tokens, *_ = example.run(batch, example.mesh_of(2), [(0, 10), (9, 24)])
    differences = np.abs(next_tokens - after_each_prompt(batch)).max(axis=(1, 2))
    assert differences[2] > 100 * example.TOLERANCE["float32"]


def test_each_pool_holds_the_keys_of_its_interval_in_order(batch):
    intervals = [(5, 8), (8, 24), (0, 5)]
    n, T = len(intervals), sum(PROMPT_LENS)
    q, k, v = (example.stripe(x, n, fill=0) for x in (batch.q, batch.k, batch.v))
    arrays = q, k, v, example.stripe_row_starts(PROMPT_LENS, n), example.kept_slots(intervals, T)
    (_, pool), _ = example.second_call(lambda *x: example.prefill(*x, pool_size=16), example.mesh_of(n), *arrays)
    for device, (start, end) in enumerate(intervals):
        kept = np.asarray(pool)[device, 0, :, : end - start, 0]
        np.testing.assert_array_equal(kept, np.stack([batch.k[start:end], batch.v[start:end]]))
        assert (np.asarray(pool)[device, 0, :, end - start :] == 0).all()


def test_tables_name_every_key_of_every_prompt_once():
    batch = example.random_batch([3, 5, 1], "float32")
    intervals = [(0, 2), (2, 2), (2, 7), (7, 9)]
    page_indices, page_starts, kv_lens = example.decode_tables(batch, intervals)
    named = [[] for _ in range(4)]  # Of each row: token indices.
    for (start, _), table, starts, lens in zip(intervals, page_indices, page_starts, kv_lens, strict=True):
        for row in range(4):
            named[row] += [start + int(slot) for slot in table[starts[row] :][: lens[row]]]
    assert named == [[0, 1, 2], [3, 4, 5, 6, 7], [8], []]


def test_inputs_are_rounded_before_anything_is_computed_from_them():
    batch = example.random_batch([4], "bfloat16")
    assert {x.dtype for x in (batch.q, batch.k, batch.v, batch.next_q)} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in example.dense_outputs(batch)} == {np.dtype("float32")}


def test_both_programs_lower_for_gpus_with_the_kernels_that_they_take_there(monkeypatch):
    monkeypatch.setattr(prefill_api, "default_variant", lambda *_: "mosaic_gpu")
    monkeypatch.setattr(decode_api, "default_variant", lambda *_: "triton")
    monkeypatch.setattr(kv_update_api, "is_triton_usable", lambda: True)
    batch, intervals, n = example.random_batch([50, 7, 40], "bfloat16"), [(0, 60), (60, 97), (0, 0)], 3
    q, k, v, next_q = (example.stripe(x, n, fill=0) for x in (batch.q, batch.k, batch.v, batch.next_q))
    pool = np.zeros((n, 1, 2, 60, 1, example.K, example.H), k.dtype)
    prefill = jax.jit(functools.partial(example.prefill, pool_size=60))
    with jax.set_mesh(example.mesh_of(n)):
        tokens = q, k, v, example.stripe_row_starts(batch.prompt_lens, n), example.kept_slots(intervals, 97)
        module = prefill.trace(*tokens).lower(lowering_platforms=("cuda",)).as_text()
        assert "@triton_kernel_call_ffi" in module
        assert "@mosaic_gpu" in module
        tables = example.decode_tables(batch, intervals)
        module = example.decode.trace(next_q, pool, *tables).lower(lowering_platforms=("cuda",)).as_text()
        assert "@triton_kernel_call_ffi" in module
