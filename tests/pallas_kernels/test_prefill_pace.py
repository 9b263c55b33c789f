"""Thread blocks of Hopper's kernel keep in step, and no one waits for long."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from loongjax.pallas_kernels.prefill_attention import mosaic_gpu_launch, mosaic_gpu_pace
from loongjax.pallas_kernels.prefill_attention.mosaic_gpu_launch import choose_paced_blocks
from loongjax.pallas_kernels.prefill_attention.mosaic_gpu_pace import (
    ENDED,
    LAP,
    MOST_LAPS_AHEAD,
    MOST_LOOKS,
    MOST_READS,
    Pace,
    Stand,
    is_ahead,
)
from tests.pallas_kernels.mosaic_interpreter import SharedCount, interpreted
from tests.pallas_kernels.test_prefill_interpreted import causal, random_inputs, run, truth
from tests.pallas_kernels.tolerance import assert_matches

NUM_PROGRAMS = 20


must_wait = jax.jit(is_ahead)


def wrapped(count: int) -> jax.Array:
    """What a word of 32 bits holds of a count."""
    return jnp.asarray(np.uint32(count % 2**32).astype(np.int32))


@settings(deadline=None)
@given(st.integers(0, 2**30), st.integers(-5, 5), st.sampled_from([1, 78, 132]))
def test_who_is_more_than_so_many_laps_ahead_of_the_mean_waits_however_often_counts_wrapped(mean, ahead, num_programs):
    own, everybody = wrapped(mean + ahead), wrapped(mean * num_programs)
    assert must_wait(own, everybody, jnp.int32(num_programs)) == (ahead > MOST_LAPS_AHEAD)
    for num_ended in (1, num_programs):
        assert not must_wait(own, everybody, jnp.int32(num_programs + num_ended * ENDED))


def spread(speeds: list[float], num_laps: int, *, is_paced: bool) -> int:
    """The most laps between the first thread block and the last, if each takes 1 / speed a lap and waits if it must."""
    laps, times, most = [0] * len(speeds), [0.0] * len(speeds), 0
    while min(laps) < num_laps:
        now, mine = min((times[i], i) for i in range(len(speeds)) if laps[i] < num_laps)
        if is_paced and must_wait(wrapped(laps[mine]), wrapped(sum(laps)), jnp.int32(len(laps))):
            times[mine] = now + 0.01
            continue
        laps[mine] += 1
        times[mine] = now + 1 / speeds[mine]
        most = max(most, max(laps) - min(laps))
    return most


def test_thread_blocks_of_different_speeds_stay_together():
    rng = random.Random(0)
    speeds = [rng.uniform(0.95, 1.0) for _ in range(NUM_PROGRAMS)]
    assert spread(speeds, 400, is_paced=False) >= 15
    # Those behind the mean are as many laps behind as those ahead of it allow.
    assert spread(speeds, 400, is_paced=True) <= 5 * MOST_LAPS_AHEAD
    assert spread([1.0] * (NUM_PROGRAMS - 1) + [0.9], 400, is_paced=True) <= (MOST_LAPS_AHEAD + 1) * NUM_PROGRAMS


@pytest.mark.parametrize(("counts", "patience"), [([8, 8, 8, 8], MOST_LOOKS), ([8, 8, 7, 8], 0), ([7, 7, 7, 7], 0)])
def test_warps_that_read_different_counts_go_on_together(counts, patience, monkeypatch):
    """The tenth lap is too early at a count below eight, if one thread block is all there are."""
    monkeypatch.setattr(mosaic_gpu_pace, "count", lambda word, amount: None)
    monkeypatch.setattr(mosaic_gpu_pace, "read", lambda word: word)
    monkeypatch.setattr(mosaic_gpu_pace, "any_thread", lambda holds: lax.pmax(holds.astype(jnp.int32), "warp") == 1)

    def keep(laps: jax.Array) -> jax.Array:
        stand = Stand(first_lap=jnp.int32(0), patience=jnp.int32(MOST_LOOKS))
        return Pace(laps, runners=jnp.int32(1)).keep(jnp.int32(9 * LAP), stand).patience

    assert jax.vmap(keep, axis_name="warp")(jnp.array(counts, jnp.int32)).tolist() == [patience] * 4


@pytest.fixture
def always_paced(monkeypatch):
    monkeypatch.setattr(mosaic_gpu_launch, "PACED_BYTES", 0)
    monkeypatch.setattr(mosaic_gpu_pace, "LAP", 2)
    SharedCount.made.clear()


def test_all_count_what_they_fetched_and_compute_the_same(always_paced):
    arrays, ranges = random_inputs(520, 600, (2, 1)), causal(520, 600)
    assert_matches(run(arrays, ranges, num_programs=2, block_kv=64), truth(arrays, ranges), "bfloat16")
    laps, runners = SharedCount.made
    # Query blocks end at key 208, 336, 464, 592 and 600, so visit 4, 6, 8, 10 and 10 key blocks, for each head; both
    # thread blocks have 38 of them, and see in each lap that they are not ahead. Whoever begins when the other has had
    # some laps counts them at once.
    assert laps.num_adds == 2 + 76 // 2
    assert 76 // 2 <= laps.value <= 76
    assert laps.num_reads >= 76 // 2
    assert runners.value == 2 + 2 * ENDED


@pytest.fixture
def nobody_has_laps(monkeypatch):
    """Thread blocks begin, and neither fetch anything nor end, as far as others see."""
    add = SharedCount._add

    def add_to_runners(self: SharedCount, amount: np.ndarray) -> tuple[()]:
        return add(self, amount) if self is SharedCount.made[1] and amount > 0 else ()

    monkeypatch.setattr(SharedCount, "_add", add_to_runners)


def test_a_thread_block_waits_once_for_others_that_have_no_laps(always_paced, nobody_has_laps):
    arrays, ranges = random_inputs(519, 600, (2, 1)), causal(519, 600)  # as no other test, to be traced here
    assert_matches(run(arrays, ranges, num_programs=2, block_kv=64), truth(arrays, ranges), "bfloat16")
    laps, _ = SharedCount.made
    # Each reads it when it begins, once in the laps in which it may be ahead, and then as often as one wait allows.
    assert laps.num_reads == 2 * (1 + MOST_LAPS_AHEAD + MOST_LOOKS)


@pytest.mark.parametrize(("lengths", "waits"), [([384, 128, 87], True), ([256, 256, 86], False)])
def test_nobody_waits_unless_somebody_visits_much(always_paced, nobody_has_laps, monkeypatch, lengths, waits):
    """Packed prompts, the longest of which is not the last: in line its last query block comes first all the same."""
    block_bytes = 2 * 64 * 64 * 2
    monkeypatch.setattr(mosaic_gpu_launch, "PACED_BYTES", 6 * block_bytes)
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
    ranges = starts, np.arange(len(starts)) + 1
    arrays = random_inputs(len(starts), len(starts), (2, 1))  # as no other test, to be traced here
    assert_matches(run(arrays, ranges, num_programs=2, block_kv=64), truth(arrays, ranges), "bfloat16")
    assert (SharedCount.made[0].num_reads > MOST_LOOKS) == waits


def join(laps: int, runners: int) -> tuple[int, list[int]]:
    """The first lap of a thread block that begins when the words hold this, and what they hold then."""
    words = [SharedCount(), SharedCount()]
    words[0].value, words[1].value = laps, runners
    with interpreted():
        stand = jax.jit(lambda: Pace(*words).begin(may_wait=jnp.bool_(True)))()
    jax.effects_barrier()
    return int(stand.first_lap), [word.value for word in words]


def test_who_begins_late_joins_at_the_mean_of_those_who_run():
    assert join(0, 0) == (0, [0, 1]), "the first of all"
    assert join(1000, 100) == (10, [1010, 101])
    assert join(1000, 100 + ENDED) == (0, [1000, 101 + ENDED]), "nobody waits any more"


@pytest.mark.parametrize(("num_waves", "num_reads"), [(0, 1), (1, 2), (3, 4), (100, MOST_READS)])
def test_who_begins_among_others_reads_until_both_words_count_the_same(num_waves, num_reads, monkeypatch):
    words = [SharedCount(), SharedCount()]
    words[0].value, words[1].value = 1000, 100
    read = SharedCount._read

    def read_as_others_join(self: SharedCount) -> np.ndarray:
        if self is words[0] and self.num_reads < num_waves:
            words[0].value += 500
            words[1].value += 50
        return read(self)

    monkeypatch.setattr(SharedCount, "_read", read_as_others_join)
    with interpreted():
        stand = jax.jit(lambda: Pace(words[0], words[1]).begin(may_wait=jnp.bool_(True)))()
    jax.effects_barrier()
    assert int(stand.first_lap) == 10
    assert words[0].num_reads == num_reads


@pytest.mark.parametrize("num_late", [1, 5])
def test_nobody_waits_for_what_late_ones_missed(num_late):
    """The others have had fifty laps when they begin."""
    on_time, late = [50] * (NUM_PROGRAMS - num_late), [join(50 * (NUM_PROGRAMS - num_late), NUM_PROGRAMS - num_late)[0]]
    stands = on_time + late * num_late
    assert not any(must_wait(wrapped(own), wrapped(sum(stands)), jnp.int32(len(stands))) for own in stands)


def test_only_long_keys_are_worth_it():
    def paced_blocks(num_keys: int, num_q_blocks: int = 1024) -> int | None:
        return choose_paced_blocks(num_keys // 128, 2 * 128 * 128 * 2, 32 * num_q_blocks, num_programs=132)

    assert [paced_blocks(num_keys) for num_keys in (4096, 16_384, 32_768, 131_072)] == [None, None, 256, 256]
    assert paced_blocks(131_072, num_q_blocks=4) is None, "each thread block takes one item"
