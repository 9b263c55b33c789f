"""Ring attention on 1 to 8 devices equals dense attention on none."""

import functools

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from loongjax.parallel import ring_attention
from loongjax.parallel.striped import stripe, stripe_row_starts, unstripe
from tests.pallas_kernels.brute_force import attend_sequences
from tests.pallas_kernels.tolerance import assert_matches
from tests.parallel.meshes import AXIS, mesh_of

N, K, H = 4, 2, 16
ROWS = 6
"""Of each rank: short sequences leave most of them as padding."""


def random_tokens(seed: int, num_tokens: int, dtype: str = "float32") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    q, k, v = (np.array(jnp.asarray(rng.standard_normal((num_tokens, heads, H)), dtype)) for heads in (N, K, K))
    return q, k, v


@functools.cache
def ring_over(mesh: Mesh, check_vma: bool = True, implementation: str | None = None, out_dtype: str | None = None):
    """Jitted ring attention of arrays [n, T, ...]."""

    def attend(*arrays):
        o, lse, carry = ring_attention(
            *(x[0] for x in arrays), axis_name=AXIS, implementation=implementation, out_dtype=out_dtype
        )
        assert carry is None
        return o[None], lse[None]

    return jax.jit(jax.shard_map(attend, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS), check_vma=check_vma))


def stripe_all(
    tokens: tuple[np.ndarray, ...], seq_lens: list[int], n: int, rows: int = ROWS, fill: float = 0.0
) -> tuple:
    return *(stripe(x, n, fill=fill, rows=rows) for x in tokens), stripe_row_starts(seq_lens, n, rows=rows)


def packings(n: int) -> dict[str, list[int]]:
    return {
        "one token": [1],
        "fewer tokens than ranks": [max(n - 1, 1)],
        "one-token prompts": [1] * (n + 2),
        "packed sequences": [n, 1, 2 * n, 2],
        "one sequence that fills every row": [ROWS * n],
    }


@pytest.mark.parametrize("n", range(1, 9))
def test_every_number_of_ranks_equals_dense_attention(n):
    ring = ring_over(mesh_of(n))
    for seed, (name, seq_lens) in enumerate(packings(n).items()):
        tokens = random_tokens(seed, sum(seq_lens))
        o, lse = (unstripe(np.asarray(x), sum(seq_lens)) for x in ring(*stripe_all(tokens, seq_lens, n)))
        try:
            assert_matches((o, lse), attend_sequences(*tokens, seq_lens))
        except AssertionError as error:
            error.add_note(name)
            raise


@pytest.mark.parametrize("n", [1, 3])
def test_types_are_right_without_the_check_of_varying_axes_too(n):
    seq_lens = [5, 1, 8]
    if n == 1:
        seq_lens = [3, 2]
    tokens = random_tokens(0, sum(seq_lens))
    o, lse = ring_over(mesh_of(n), check_vma=False)(*stripe_all(tokens, seq_lens, n))
    assert_matches([unstripe(np.asarray(x), len(tokens[0])) for x in (o, lse)], attend_sequences(*tokens, seq_lens))


def test_padding_rows_give_zero_and_nan_in_them_harms_nobody():
    seq_lens, n = [4, 3], 3
    tokens = random_tokens(1, 7)
    o, lse = ring_over(mesh_of(n))(*stripe_all(tokens, seq_lens, n, fill=np.nan))
    o, lse = (unstripe(np.asarray(x), ROWS * n) for x in (o, lse))
    assert_matches((o[:7], lse[:7]), attend_sequences(*tokens, seq_lens))
    assert (o[7:] == 0).all()
    assert (lse[7:] == -np.inf).all()


def test_partial_outputs_are_float32_between_steps():
    seq_lens, n = [40], 8
    tokens = random_tokens(2, 40, "bfloat16")
    expected = attend_sequences(*tokens, seq_lens)
    for out_dtype in (None, "float32"):
        o, lse = ring_over(mesh_of(n), out_dtype=out_dtype)(*stripe_all(tokens, seq_lens, n))
        assert o.dtype == ("bfloat16" if out_dtype is None else out_dtype)
        assert_matches([unstripe(np.asarray(x), 40) for x in (o, lse)], expected, "bfloat16")
    # One rounding of the weights is left, and none of the partial outputs.
    assert np.abs(unstripe(np.asarray(o), 40) - expected[0]).max() < 6e-3


def test_the_reference_variant_serves_too():
    seq_lens, n = [7, 4], 2
    tokens = random_tokens(3, 11)
    outputs = ring_over(mesh_of(n), implementation="reference")(*stripe_all(tokens, seq_lens, n))
    assert_matches([unstripe(np.asarray(x), 11) for x in outputs], attend_sequences(*tokens, seq_lens))


def test_a_mesh_with_a_second_axis_over_the_heads():
    mesh = Mesh(np.array(jax.devices())[[1, 2, 4, 5, 6, 7]].reshape(3, 2), (AXIS, "heads"))
    seq_lens, n = [9, 2], 3
    tokens = random_tokens(4, 11)

    def attend(*arrays):
        o, lse, _ = ring_attention(*(x[0] for x in arrays), axis_name=AXIS)
        return o[None], lse[None]

    by_head = P(AXIS, None, "heads")
    ring = jax.shard_map(attend, mesh=mesh, in_specs=(by_head, by_head, by_head, P(AXIS)), out_specs=by_head)
    outputs = jax.jit(ring)(*stripe_all(tokens, seq_lens, n))
    assert_matches([unstripe(np.asarray(x), 11) for x in outputs], attend_sequences(*tokens, seq_lens))


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_every_block_is_visited_once_in_ring_order_with_its_own_keys(n):
    tokens = random_tokens(5, ROWS * n)

    def visit(source_rank, k, v, carry):
        step, order, blocks = carry
        return step + 1, order.at[step].set(source_rank), blocks.at[source_rank].add(jnp.stack([k, v]))

    def attend(*arrays):
        nothing = jnp.int32(0), jnp.full(n, -1, jnp.int32), jnp.zeros((n, 2, ROWS, K, H))
        _, _, carry = ring_attention(*(x[0] for x in arrays), axis_name=AXIS, visit=visit, carry=nothing)
        return jax.tree.map(lambda x: x[None], carry)

    ring = jax.shard_map(attend, mesh=mesh_of(n), in_specs=P(AXIS), out_specs=P(AXIS))
    q, k, v, row_starts = stripe_all(tokens, [ROWS * n], n)
    steps, orders, blocks = jax.jit(ring)(q, k, v, row_starts)
    np.testing.assert_array_equal(steps, np.full(n, n))
    for rank in range(n):
        np.testing.assert_array_equal(orders[rank], [(rank - step) % n for step in range(n)])
        np.testing.assert_array_equal(blocks[rank], np.stack([k, v], axis=1))


def equations(jaxpr: jax.extend.core.Jaxpr) -> list:
    """All equations, those of inner jaxprs after the one that holds them."""
    found = []
    for equation in jaxpr.eqns:
        found.append(equation)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                found.extend(equations(inner))
    return found


def traced(n: int) -> list:
    arrays = stripe_all(random_tokens(0, n), [n], n)
    return equations(jax.make_jaxpr(ring_over(mesh_of(n)))(*arrays).jaxpr)


def test_the_program_does_not_grow_with_the_number_of_ranks():
    assert len(traced(2)) == len(traced(8))


def test_keys_are_permuted_n_minus_one_times():
    equations = traced(5)
    loops = [x for x in equations if x.primitive.name == "scan" and "ppermute" in str(x.params["jaxpr"])]
    assert [x.params["length"] for x in loops] == [4]
    assert sum(x.primitive.name == "ppermute" for x in equations) == 2


def test_the_next_keys_are_sent_before_the_attention_of_a_step():
    loop = next(x for x in traced(5) if x.primitive.name == "scan" and "ppermute" in str(x.params["jaxpr"]))
    body = [x.primitive.name for x in loop.params["jaxpr"].jaxpr.eqns]
    permutes = [i for i, name in enumerate(body) if name == "ppermute"]
    attention = [i for i, x in enumerate(loop.params["jaxpr"].jaxpr.eqns) if "attention" in str(x.params.get("name"))]
    assert len(attention) == 1
    assert max(permutes) < attention[0]


def test_one_rank_needs_no_collective():
    names = {x.primitive.name for x in traced(1)}
    assert not names & {"ppermute", "psum", "all_gather", "all_to_all"}


def test_gradients_flow_through_the_ring():
    seq_lens, n = [7, 1, 5], 3
    tokens = random_tokens(6, 13)
    rows = stripe_all(tokens, seq_lens, n, rows=5)
    one_row = stripe_all(tokens, seq_lens, 1, rows=13)

    def gradients(n, arrays):
        def loss(q, k, v):
            o, lse = ring_over(mesh_of(n))(q, k, v, arrays[3])
            return (o**2).sum() + jnp.where(lse == -jnp.inf, 0.0, jnp.sin(lse)).sum()

        return [unstripe(np.asarray(x), 13) for x in jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arrays[:3])]

    for actual, expected in zip(gradients(n, rows), gradients(1, one_row), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
