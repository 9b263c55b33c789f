"""The exchange kernels between processes, every value checked."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import triton.language as tl

from loongjax.pallas_kernels.exchange import kernels, workspace
from tests.pallas_kernels.interpreted.exchange_world import (
    Cut,
    Device,
    World,
    map_workspaces,
    new_workspaces,
    time_of,
)

NUM_DEVICES = 4


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = World(NUM_DEVICES)
    yield world
    world.close()


def normal(*shape: int, seed: Sequence[int]) -> np.ndarray:
    """The same in every process."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def rounds(size: int, block: int, programs: int) -> Cut:
    return Cut(block, programs, math.ceil(size / (block * programs)))


def check_all_reduce(device: Device, members: Sequence[int], size: int, cut: Cut, seed: int) -> None:
    xs = [normal(size, seed=(seed, member)) for member in members]
    found = device.all_reduce(xs[members.index(device.place)], members, cut)
    expected = np.zeros(size, np.float32)
    for x in xs:
        expected += x
    np.testing.assert_array_equal(found, expected)


def check_all_gather(device: Device, members: Sequence[int], size: int, cut: Cut, seed: int) -> None:
    xs = [normal(size, seed=(seed, member)) for member in members]
    found = device.all_gather(xs[members.index(device.place)], members, cut)
    np.testing.assert_array_equal(found, np.stack(xs))


def check_exchange_and_merge(device: Device, members: Sequence[int], size: int, cut: Cut, seed: int) -> None:
    """`size` rows, some without keys on some ranks, some without any."""
    head_dim = 5
    rank, n = members.index(device.place), len(members)
    os = np.stack([normal(n, size, head_dim, seed=(seed, member)) for member in members])
    lses = np.stack([10 * normal(n, size, seed=(seed, member, 1)) for member in members])
    lses[normal(n, n, size, seed=(seed, 2)) > 0.5] = -np.inf
    lses[:, :, 0] = -np.inf
    os[np.isneginf(lses)] = np.nan
    found_o, found_lse = device.exchange_and_merge(os[rank], lses[rank], members, cut)
    for row in range(size):
        parts = [r for r in range(n) if lses[r, rank, row] > -np.inf]
        if not parts:
            assert (found_o[row] == 0).all()
            assert found_lse[row] == -np.inf
            continue
        lse = np.logaddexp.reduce(lses[parts, rank, row].astype(np.float64))
        weights = np.exp(lses[parts, rank, row] - lse)
        np.testing.assert_allclose(found_o[row], weights @ os[parts, rank, row], rtol=2e-6, atol=2e-6)
        np.testing.assert_allclose(found_lse[row], lse, rtol=1e-6, atol=1e-6)


CHECKS = (check_all_reduce, check_all_gather, check_exchange_and_merge)


def all_sizes(device: Device, num_ranks: int) -> None:
    members = [3, 0, 2, 1][:num_ranks]
    if device.place not in members:
        return
    for step, (size, programs, check) in enumerate(itertools.product((1, 13), (1, 3), CHECKS)):
        check(device, members, size, rounds(size, 4, programs), step)
    assert device.status == 0


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_messages_of_any_size_in_any_number_of_rounds(world, num_ranks):
    world.run(all_sizes, num_ranks)


def changing_groups(device: Device, num_steps: int, max_ranks: int, checks: Sequence[Callable]) -> None:
    rng = np.random.default_rng(num_steps)
    for step in range(num_steps):
        members = rng.permutation(NUM_DEVICES)[: rng.integers(2, max_ranks + 1)].tolist()
        programs, size, check = int(rng.integers(1, 3)), int(rng.integers(1, 9)), checks[int(rng.integers(len(checks)))]
        if device.place in members:
            check(device, members, size, rounds(size, 4, programs), step)
    assert device.status == 0


def test_mixed_exchanges_in_overlapping_groups_that_change_each_time(world):
    world.run(changing_groups, 60, NUM_DEVICES, CHECKS)


def test_many_small_exchanges_of_changing_pairs_and_threes(world):
    world.run(changing_groups, 120, 3, (check_all_reduce,))


def wrapping(device: Device) -> None:
    """Numbers begin again after the third exchange."""
    for step, members in enumerate([(0, 1), (0, 1, 2), (2, 1), (1, 0), (0, 1, 2), (0, 1), (1, 2), (2, 0, 1)]):
        if device.place in members:
            check_all_reduce(device, members, 9, rounds(9, 4, 1), step)
    assert device.status == 0


def test_message_numbers_begin_again(world):
    def prepare(memory: np.ndarray) -> None:
        for place in range(NUM_DEVICES):
            Device(place, memory).set_numbers(workspace.NUMBER_MASK - 4)

    world.run(wrapping, prepare=prepare)


def check_every_bit(device: Device, dtype: str) -> None:
    """Numbers close to 0 and to where signs, exponents and words change, and others; but a NaN may become another."""
    members = (1, 0)
    edges = np.add.outer(np.arange(0, 2**16, 2**10), np.arange(-2, 3)).astype(np.uint16).ravel()
    bits = np.concatenate([edges, np.random.default_rng(0).integers(0, 2**16, 180).astype(np.uint16)])
    xs = [np.roll(bits, member).view(dtype) for member in members]
    found = device.all_gather(xs[members.index(device.place)], members, rounds(xs[0].size, 64, 2))
    for x, received in zip(xs, found, strict=True):
        if np.issubdtype(x.dtype, np.floating):
            is_nan = np.isnan(x)
            assert np.isnan(received[is_nan]).all()
            x, received = x[~is_nan], received[~is_nan]
        np.testing.assert_array_equal(received.view(np.uint8), x.view(np.uint8))


def all_dtypes(device: Device) -> None:
    for dtype in ("float16", "float32", "int8", "uint8", "int16", "uint16", "int32", "uint32"):
        if device.place < 2:
            check_every_bit(device, dtype)
    if device.place < 2:
        xs = [np.arange(50) % (3 + member) == 0 for member in range(2)]
        found = device.all_gather(xs[device.place], (0, 1), rounds(50, 16, 2))
        np.testing.assert_array_equal(found, np.stack(xs))
    assert device.status == 0


def test_every_bit_arrives_whatever_the_dtype(world):
    world.run(all_dtypes)


def merges_in_16_bits(device: Device) -> None:
    """Rows of any size, zeros too, and parts that float16 could not hold, with little weight."""
    members, num_rows, head_dim = (0, 2, 1), 40, 8
    if device.place not in members:
        return
    rank, n = members.index(device.place), len(members)
    sizes = 10.0 ** np.random.default_rng(0).integers(-9, 9, (n, n, num_rows, 1))
    sizes[0] = np.minimum(sizes[0], 10)
    sizes[0, :, ::5] = 0
    os = (sizes * normal(n, n, num_rows, head_dim, seed=(1,))).astype(np.float32)
    lses = np.log(sizes[..., 0].clip(1e-9) ** -1).astype(np.float32)
    found, _ = device.exchange_and_merge(os[rank], lses[rank], members, rounds(num_rows, 16, 2), np.float16)
    mine, weights = os[:, rank].astype(np.float64), np.exp(lses[:, rank].astype(np.float64))[..., None]
    weights /= weights.sum(axis=0)
    exact = (weights * mine).sum(axis=0)
    # Each part is rounded once in units of its row's largest, and the result once more.
    largest = (weights * np.abs(mine).max(axis=-1, keepdims=True)).sum(axis=0)
    assert found.dtype == np.float16
    assert (np.abs(found - exact) <= 2.0**-11 * np.abs(exact) + 2.0**-12 * 1.01 * largest + 2.0**-24).all()
    assert device.status == 0


def test_partial_outputs_travel_in_16_bits_where_the_result_has_no_more(world):
    world.run(merges_in_16_bits)


def late(device: Device, late_place: int) -> None:
    members = (2, 0, 1)
    if device.place in members:
        for step, check in enumerate(CHECKS):
            if device.place == late_place:
                time.sleep(0.2)
            check(device, members, 9, rounds(9, 4, 1), step)
        assert device.status == 0


@pytest.mark.parametrize("late_place", range(3))
def test_a_late_device_is_waited_for(world, late_place):
    world.run(late, late_place)


@pytest.fixture
def devices(monkeypatch) -> Iterator[list[Device]]:
    """Three whose patience ends at the third look at a clock that moves on with each, one after each poll; they can
    work one after another, in this process.
    """
    times = itertools.count(1000)
    monkeypatch.setattr(kernels, "clock_us", lambda: time_of(next(times)))
    monkeypatch.setattr(kernels, "POLLS_A_LOOK", tl.constexpr(1))
    with new_workspaces(3, wait_limit_us=2) as path:
        yield [Device(place, map_workspaces(path, 3)) for place in range(3)]


@pytest.fixture
def num_polls(monkeypatch) -> list[int]:
    """Grows by the number of polls."""
    poll, counted = kernels.poll, [0]

    def count(*arguments):
        counted[0] += 1
        return poll(*arguments)

    monkeypatch.setattr(kernels, "poll", count)
    return counted


ONE = np.ones(1, np.float32)
CUT = Cut(4, 1, 1)


def test_who_waits_in_vain_ends_and_says_for_whom(devices, num_polls):
    first = devices[2]
    first.all_reduce(ONE, (0, 2), CUT)
    assert num_polls == [4]
    assert workspace.Failure.from_status(first.status) == (2, 0, 1)
    assert first.read_status((2, 0)) == first.status
    assert devices[0].status == devices[1].status == 0


def test_the_clock_is_looked_at_once_in_many_polls(devices, num_polls, monkeypatch):
    monkeypatch.setattr(kernels, "POLLS_A_LOOK", tl.constexpr(5))
    devices[2].all_reduce(ONE, (0, 2), CUT)
    assert num_polls == [16]


def test_of_several_missing_devices_the_first_is_named(devices):
    devices[1].all_gather(ONE, (2, 0, 1), CUT)
    assert workspace.Failure.from_status(devices[1].status) == (1, 0, 1)


def test_the_number_of_the_missing_message_is_told(devices):
    for device in devices[:2]:
        device.set_numbers(77)
    devices[0].all_reduce(ONE, (0, 1), CUT)
    assert workspace.Failure.from_status(devices[0].status) == (0, 1, 78)


def test_who_has_failed_looks_once_and_waits_no_more(devices, num_polls):
    devices[0].all_reduce(ONE, (0, 1), CUT)
    num_polls[0] = 0
    status = devices[0].status
    devices[0].all_reduce(ONE, (0, 1), CUT)
    devices[0].all_gather(np.ones(30, np.float32), (0, 2), Cut(4, 2, 4))
    assert num_polls == [1 + 2 * 4]
    assert devices[0].status == status


def test_who_has_failed_gives_the_news_in_place_of_messages(devices):
    devices[0].all_reduce(ONE, (0, 1), CUT)
    assert devices[1].status == devices[2].status == 0
    # The message was sent before the failure, so it is good.
    np.testing.assert_array_equal(devices[1].all_reduce(ONE, (0, 1), CUT), 2 * ONE)
    assert devices[1].status == 0
    # In place of all others comes the news, and from there it spreads.
    devices[0].all_reduce(ONE, (1, 0), CUT)
    assert devices[1].status == devices[0].status
    assert devices[2].status == 0
    devices[1].all_gather(ONE, (2, 1), CUT)
    assert devices[2].status == devices[0].status


@pytest.mark.parametrize("act", [check_all_reduce, check_all_gather, check_exchange_and_merge])
def test_who_has_failed_writes_over_nothing(devices, act):
    """Its peer could still be reading what it was sent before."""
    devices[0].header(workspace.STATUS)[:] = 1
    buffers = devices[1].memory[1, workspace.BUFFERS :]
    for step in range(2):
        with contextlib.suppress(AssertionError):
            act(devices[0], (0, 1), 3, rounds(3, 4, 1), step)
    assert not buffers.any()
    assert devices[1].status == 1


def test_a_failure_in_one_round_ends_the_waits_of_the_others(devices, num_polls):
    devices[0].all_reduce(np.ones(12, np.float32), (0, 1), Cut(4, 1, 3))
    assert num_polls == [4 + 1 + 1]
    assert workspace.Failure.from_status(devices[0].status) == (0, 1, 1)
