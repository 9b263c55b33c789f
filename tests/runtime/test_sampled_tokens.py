"""Input tokens that the host has not read, against the same looked up on the host."""

import jax
import numpy as np
import pytest

from loongjax.core.cluster import Group
from loongjax.core.request import Request
from loongjax.core.sampling import SamplingParams
from loongjax.parallel.mesh import DeviceGrid
from loongjax.runtime.programs import BY_RANK
from loongjax.runtime.sampled_tokens import SampledTokens


def request(name: str) -> Request:
    return Request(request_id=name, prompt_token_ids=(0,), sampling=SamplingParams(), max_tokens=1, seed=0)


def on_devices(grid: DeviceGrid, group: Group, rows: np.ndarray) -> jax.Array:
    return jax.device_put(rows.astype(np.int32), grid.sharding(group, BY_RANK))


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("instances", [(0,), (1, 3), (0, 2, 3)])
@pytest.mark.parametrize("num_sampled", [1, 4])
@pytest.mark.parametrize("num_inputs", [1, 4, 7])
def test_awaited_rows_get_their_requests_tokens_and_others_keep_theirs(
    tp: int, instances: tuple[int, ...], num_sampled: int, num_inputs: int
) -> None:
    grid, group, random = DeviceGrid(jax.devices(), tp=tp), Group.of(instances), np.random.default_rng(0)
    n = group.dop
    sampled = random.integers(100, 1000, (n, num_sampled))
    names = np.array([f"r{i}" for i in range(n * num_sampled)]).reshape(n, num_sampled)
    rows = [{row: request(name) for row, name in enumerate(by_rank.tolist())} for by_rank in names]
    known = random.integers(0, 100, (n, num_inputs))
    places = random.permutation(n * num_inputs)[: random.integers(1, min(known.size, sampled.size) + 1)]
    sources = random.permutation(sampled.size)[: len(places)]
    expected = known.copy()
    expected.flat[places] = sampled.flat[sources]

    tokens = SampledTokens(grid)
    with jax.set_mesh(grid.mesh(group)):
        tokens.keep(group, rows, on_devices(grid, group, sampled))
        awaited = {
            divmod(place, num_inputs): names.flat[source]
            for place, source in zip(places.tolist(), sources.tolist(), strict=True)
        }
        filled = tokens.fill_in(group, on_devices(grid, group, known), awaited)
    np.testing.assert_array_equal(filled, expected)


def test_the_newest_iteration_on_an_instance_counts() -> None:
    grid, one, both = DeviceGrid(jax.devices()), Group.of([0]), Group.of([0, 1])
    tokens = SampledTokens(grid)

    def keep(group: Group, name: str, token_id: int) -> None:
        rows = [{0: request(name)}, *[{}] * (group.dop - 1)]
        tokens.keep(group, rows, on_devices(grid, group, np.full((group.dop, 1), token_id)))

    def token_of(group: Group, name: str) -> int:
        with jax.set_mesh(grid.mesh(group)):
            inputs = on_devices(grid, group, np.zeros((group.dop, 1)))
            return int(tokens.fill_in(group, inputs, {(0, 0): name})[0, 0])

    keep(one, "a", 7)
    assert token_of(one, "a") == 7
    keep(one, "a", 8)
    assert token_of(one, "a") == 8
    keep(both, "b", 9)
    assert token_of(both, "b") == 9
    with pytest.raises(KeyError):
        token_of(one, "a")
    keep(Group.of([2]), "c", 10)
    assert token_of(both, "b") == 9, "of other instances"
    tokens.clear()
    with pytest.raises(KeyError):
        token_of(both, "b")
