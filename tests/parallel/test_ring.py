"""Ring attention on 1 to 8 devices, in every variant, equals dense attention on none."""

import functools
import inspect

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from loongjax.parallel import ring as ring_module
from loongjax.parallel import ring_attention, stripe, stripe_row_starts, unstripe
from loongjax.parallel.ring import MAX_GATHERED_BLOCK_BYTES, VARIANTS, default_variant
from loongjax.parallel.ring_permute import _pack
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
def ring_over(mesh: Mesh, variant: str | None = None, check_vma: bool = True, **options: str | None):
    """Jitted ring attention of arrays [n, T, ...]."""

    def attend(*arrays):
        o, lse, carry = ring_attention(*(x[0] for x in arrays), axis_name=AXIS, variant=variant, **options)
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


@pytest.mark.parametrize(
    ("variant", "n"),
    [*((None, n) for n in range(1, 9)), ("ring", 2), ("ring", 6), ("all_gather", 2), ("all_gather", 7)],
)
def test_every_number_of_ranks_equals_dense_attention(variant, n):
    ring = ring_over(mesh_of(n), variant)
    for seed, (name, seq_lens) in enumerate(packings(n).items()):
        tokens = random_tokens(seed, sum(seq_lens))
        o, lse = (unstripe(np.asarray(x), sum(seq_lens)) for x in ring(*stripe_all(tokens, seq_lens, n)))
        try:
            assert_matches((o, lse), attend_sequences(*tokens, seq_lens))
        except AssertionError as error:
            error.add_note(name)
            raise


@pytest.mark.parametrize(("variant", "n"), [(None, 1), *((variant, 3) for variant in VARIANTS)])
def test_types_are_right_without_the_check_of_varying_axes_too(variant, n):
    seq_lens = [5, 1, 8]
    if n == 1:
        seq_lens = [3, 2]
    tokens = random_tokens(0, sum(seq_lens))
    o, lse = ring_over(mesh_of(n), variant, check_vma=False)(*stripe_all(tokens, seq_lens, n))
    assert_matches([unstripe(np.asarray(x), len(tokens[0])) for x in (o, lse)], attend_sequences(*tokens, seq_lens))


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_rows_give_zero_and_nan_in_them_harms_nobody(variant):
    seq_lens, n = [4, 3], 3
    tokens = random_tokens(1, 7)
    o, lse = ring_over(mesh_of(n), variant)(*stripe_all(tokens, seq_lens, n, fill=np.nan))
    o, lse = (unstripe(np.asarray(x), ROWS * n) for x in (o, lse))
    assert_matches((o[:7], lse[:7]), attend_sequences(*tokens, seq_lens))
    assert (o[7:] == 0).all()
    assert (lse[7:] == -np.inf).all()


@pytest.mark.parametrize(("variant", "n"), [("loop", 8), ("ring", 3), ("all_gather", 3)])
def test_partial_outputs_are_float32_between_steps(variant, n):
    seq_lens = [18]
    tokens = random_tokens(2, 18, "bfloat16")
    expected = attend_sequences(*tokens, seq_lens)
    for out_dtype in (None, "float32"):
        o, lse = ring_over(mesh_of(n), variant, out_dtype=out_dtype)(*stripe_all(tokens, seq_lens, n))
        assert o.dtype == ("bfloat16" if out_dtype is None else out_dtype)
        assert_matches([unstripe(np.asarray(x), 18) for x in (o, lse)], expected, "bfloat16")
    # One rounding of the weights is left, and none of the partial outputs.
    assert np.abs(unstripe(np.asarray(o), 18) - expected[0]).max() < 6e-3


def test_the_reference_variant_serves_too():
    seq_lens, n = [7, 4], 2
    tokens = random_tokens(3, 11)
    outputs = ring_over(mesh_of(n), implementation="reference")(*stripe_all(tokens, seq_lens, n))
    assert_matches([unstripe(np.asarray(x), 11) for x in outputs], attend_sequences(*tokens, seq_lens))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_mesh_with_a_second_axis_over_the_heads(variant):
    mesh = Mesh(np.array(jax.devices())[[1, 2, 4, 5, 6, 7]].reshape(3, 2), (AXIS, "heads"))
    seq_lens, n = [9, 2], 3
    tokens = random_tokens(4, 11)

    def attend(*arrays):
        o, lse, _ = ring_attention(*(x[0] for x in arrays), axis_name=AXIS, variant=variant)
        return o[None], lse[None]

    by_head = P(AXIS, None, "heads")
    ring = jax.shard_map(attend, mesh=mesh, in_specs=(by_head, by_head, by_head, P(AXIS)), out_specs=by_head)
    outputs = jax.jit(ring)(*stripe_all(tokens, seq_lens, n))
    assert_matches([unstripe(np.asarray(x), 11) for x in outputs], attend_sequences(*tokens, seq_lens))


@pytest.mark.parametrize(
    ("variant", "n"), [("loop", 1), ("loop", 2), ("loop", 5), ("ring", 3), ("all_gather", 1), ("all_gather", 3)]
)
def test_every_block_is_visited_once_in_ring_order_with_its_own_keys(variant, n):
    tokens = random_tokens(5, ROWS * n)

    def visit(source_rank, k, v, carry):
        step, order, blocks = carry
        return step + 1, order.at[step].set(source_rank), blocks.at[source_rank].add(jnp.stack([k, v]))

    def attend(*arrays):
        nothing = jnp.int32(0), jnp.full(n, -1, jnp.int32), jnp.zeros((n, 2, ROWS, K, H))
        _, _, carry = ring_attention(
            *(x[0] for x in arrays), axis_name=AXIS, visit=visit, carry=nothing, variant=variant
        )
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


def traced(n: int, variant: str | None = None) -> list:
    arrays = stripe_all(random_tokens(0, n), [n], n)
    return equations(jax.make_jaxpr(ring_over(mesh_of(n), variant))(*arrays).jaxpr)


def names_of(equations: list) -> list[str]:
    """Of the primitives; "attention" for a whole call of it."""
    return ["attention" if "attention" in str(x.params.get("name")) else x.primitive.name for x in equations]


def test_the_looped_program_does_not_grow_with_the_number_of_ranks():
    assert len(traced(2, "loop")) == len(traced(8, "loop"))


def test_keys_and_values_are_permuted_n_minus_one_times_in_one_message():
    looped = traced(5, "loop")
    loops = [x for x in looped if x.primitive.name == "scan" and "ppermute" in str(x.params["jaxpr"])]
    assert [x.params["length"] for x in loops] == [4]
    assert names_of(looped).count("ppermute") == 1
    assert names_of(traced(5, "ring")).count("ppermute") == 4


@pytest.mark.parametrize(("dtype", "head_dim"), [("bfloat16", 16), ("float16", 16), ("bfloat16", 7), ("float32", 16)])
def test_a_message_holds_every_bit_of_keys_and_values(dtype, head_dim):
    bits = np.arange(2 * 3 * 2 * head_dim).reshape(2, 3, 2, head_dim) * 257 + 31_700
    k, v = (jnp.asarray(x.astype("uint16").view(dtype) if dtype != "float32" else x.astype(dtype)) for x in bits)
    message = np.asarray(jax.jit(_pack)(k, v))
    assert message.dtype == k.dtype
    assert message.tobytes() == np.asarray(k).tobytes() + np.asarray(v).tobytes()


@pytest.mark.parametrize("is_jitted", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_tokens_at_all(variant, is_jitted):
    def attend(*arrays):
        return ring_attention(*arrays, axis_name=AXIS, variant=variant)[:2]

    ring = jax.shard_map(attend, mesh=mesh_of(3), in_specs=P(AXIS), out_specs=P(AXIS))
    nothing = *(jnp.zeros((0, heads, H)) for heads in (N, K, K)), jnp.zeros(0, jnp.int32)
    o, lse = (jax.jit(ring) if is_jitted else ring)(*nothing)
    assert o.shape == (0, N, H)
    assert lse.shape == (0, N)


def test_a_message_may_hold_no_tokens():
    nothing = jnp.zeros((0, 2, 8), "bfloat16")
    assert _pack(nothing, nothing).shape == (2, 0, 2, 8)


def test_the_next_keys_are_sent_before_the_attention_of_a_step():
    loop = next(x for x in traced(5, "loop") if x.primitive.name == "scan" and "ppermute" in str(x.params["jaxpr"]))
    body = names_of(loop.params["jaxpr"].jaxpr.eqns)
    assert body.count("attention") == 1
    assert body.index("ppermute") < body.index("attention")


def test_no_keys_are_sent_on_before_the_attention_to_those_before_them_is_there():
    steps = [x for x in names_of(traced(4, "ring")) if x in ("ppermute", "attention", "optimization_barrier")]
    assert steps == ["optimization_barrier"] + ["ppermute", "attention", "optimization_barrier"] * 3 + ["attention"]


@pytest.mark.parametrize(("n", "num_attentions", "num_merged"), [(2, 2, [2]), (4, 4, [4]), (6, 6, [4, 3])])
def test_at_most_four_partial_outputs_wait_to_be_merged(n, num_attentions, num_merged):
    names = traced(n, "ring")
    assert names_of(names).count("attention") == num_attentions
    stacks = [x.outvars[0].aval.shape for x in names if x.primitive.name == "stack"]
    assert [shape[0] for shape in stacks if shape[1:] == (ROWS, N, H)] == num_merged


def test_all_keys_come_by_one_all_gather_to_one_attention():
    names = names_of(traced(5, "all_gather"))
    assert [names.count(name) for name in ("all_gather", "attention", "ppermute")] == [1, 1, 0]


@pytest.mark.parametrize("variant", [None, *VARIANTS])
def test_one_rank_needs_no_collective_and_no_merge(variant):
    names = names_of(traced(1, variant))
    assert not set(names) & {"ppermute", "psum", "all_gather", "all_to_all", "stack"}
    assert names.count("attention") == 1


def test_gpus_gather_small_blocks_and_hand_large_ones_on():
    assert default_variant("gpu", 1 << 20) == "all_gather"
    assert default_variant("gpu", MAX_GATHERED_BLOCK_BYTES) == "all_gather"
    assert default_variant("gpu", MAX_GATHERED_BLOCK_BYTES + 1) == "ring"
    assert default_variant("cpu", 1 << 20) == default_variant("cpu", 1 << 30) == "loop"


def test_the_default_counts_keys_and_values_of_one_rank(monkeypatch):
    seen = []
    monkeypatch.setattr(ring_module, "default_variant", lambda *arguments: seen.append(arguments) or "loop")
    jax.make_jaxpr(ring_over.__wrapped__(mesh_of(2)))(*stripe_all(random_tokens(0, 2), [2], 2))
    assert seen == [("cpu", 2 * ROWS * K * H * 4)]


@pytest.mark.parametrize("n", [1, 2])
def test_an_unknown_variant_is_refused_with_the_names_of_all(n):
    with pytest.raises(ValueError, match="None or one of all_gather, loop, ring, got 'star'"):
        traced(n, "star")


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize(
    ("name", "shape", "dtype", "message"),
    [
        ("row_starts", (ROWS - 1,), "int32", r"row_starts must have the shape \[T=6\], got \[5\]"),
        ("row_starts", (ROWS,), "float32", "row_starts must be int32, got float32"),
        ("k", (ROWS - 1, K, H), "float32", r"k must have the shape \[T=6, K=2, H=16\], got \[5, 2, 16\]"),
        ("v", (ROWS, 1, H), "float32", r"v must have the shape \[T=6, K=2, H=16\], got \[6, 1, 16\]"),
        ("v", (ROWS, K, H), "bfloat16", "q, k, v must have one dtype, got float32, float32, bfloat16"),
        ("q", (ROWS, 3, H), "float32", "query heads must be a multiple of KV heads, got 3 and 2"),
    ],
)
def test_operands_that_do_not_fit_each_other_are_refused(n, name, shape, dtype, message):
    heads = {"q": N, "k": K, "v": K}
    operands = {key: jax.ShapeDtypeStruct((n, ROWS, count, H), "float32") for key, count in heads.items()}
    operands |= {"row_starts": jax.ShapeDtypeStruct((n, ROWS), "int32")}
    operands[name] = jax.ShapeDtypeStruct((n, *shape), dtype)
    plain = inspect.unwrap(ring_attention)  # without what checks the annotations of the tests
    attend = jax.shard_map(
        lambda operands: plain(**{key: x[0] for key, x in operands.items()}, axis_name=AXIS)[0][None],
        mesh=mesh_of(n),
        in_specs=P(AXIS),
        out_specs=P(AXIS),
    )
    with pytest.raises(ValueError, match=f"^ring_attention: {message}"):
        jax.eval_shape(attend, operands)


def test_a_scale_may_be_a_scalar_of_jax_but_is_never_traced():
    arrays = stripe_all(random_tokens(1, 9), [5, 4], 2)

    def scaled(sm_scale, *arrays):
        o, _, _ = ring_attention(*(x[0] for x in arrays), axis_name=AXIS, sm_scale=sm_scale)
        return o[None]

    def run(sm_scale):
        attend = functools.partial(scaled, sm_scale)
        return jax.jit(jax.shard_map(attend, mesh=mesh_of(2), in_specs=P(AXIS), out_specs=P(AXIS)))(*arrays)

    np.testing.assert_array_equal(run(jnp.float32(0.5)), run(0.5))
    with pytest.raises(TypeError, match="ring_attention: sm_scale becomes part of the program"):
        jax.jit(run)(jnp.float32(0.5))


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_flow_through_every_variant(variant):
    seq_lens, n = [7, 1, 5], 3
    tokens = random_tokens(6, 13)
    rows = stripe_all(tokens, seq_lens, n, rows=5)
    one_row = stripe_all(tokens, seq_lens, 1, rows=13)

    def gradients(n, arrays):
        def loss(q, k, v):
            o, lse = ring_over(mesh_of(n), variant)(q, k, v, arrays[3])
            return (o**2).sum() + jnp.sin(jnp.where(lse == -jnp.inf, 0.0, lse)).sum()

        return [unstripe(np.asarray(x), 13) for x in jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arrays[:3])]

    for actual, expected in zip(gradients(n, rows), gradients(1, one_row), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_flow_in_half_precision_too(variant):
    """Whose keys travel as the bits of other numbers."""
    seq_lens, n = [7, 1, 5], 3
    rows = stripe_all(random_tokens(6, 13, "bfloat16"), seq_lens, n, rows=5)

    def gradients(n, arrays):
        def loss(q, k, v):
            o, _ = ring_over(mesh_of(n), variant)(q, k, v, arrays[3])
            return (o.astype(jnp.float32) ** 2).sum()

        found = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arrays[:3])
        return [unstripe(np.asarray(x.astype(jnp.float32)), 13) for x in found]

    exact = [np.asarray(x).astype(np.float32) for x in random_tokens(6, 13, "bfloat16")]
    one_rank = stripe_all(tuple(exact), seq_lens, 1, rows=13)
    for actual, expected in zip(gradients(n, rows), gradients(1, one_rank), strict=True):
        assert np.abs(actual - expected).max() < 0.02 * np.abs(expected).max()


@pytest.mark.parametrize("variant", ["loop", "all_gather"])
def test_a_donated_carry_is_updated_in_place(variant):
    n, elements = 3, 1 << 20

    def attend(pool, *arrays):
        def visit(source_rank, k, v, pool):
            return jax.lax.dynamic_update_slice(pool, (k + v).reshape(1, -1), (source_rank, jnp.int32(0)))

        o, _, pool = ring_attention(
            *(x[0] for x in arrays), axis_name=AXIS, visit=visit, carry=pool[0], variant=variant
        )
        return pool[None], o[None]

    ring = jax.shard_map(attend, mesh=mesh_of(n), in_specs=P(AXIS), out_specs=P(AXIS))
    pool = jax.ShapeDtypeStruct((n, n, elements), jnp.float32)
    arrays = stripe_all(random_tokens(0, n), [n], n)
    memory = jax.jit(ring, donate_argnums=0).lower(pool, *arrays).compile().memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes == n * elements * 4
    assert memory.temp_size_in_bytes < elements


@pytest.mark.parametrize(("variant", "collective"), [("ring", "collective_permute"), ("all_gather", "all_gather")])
def test_both_variants_for_gpus_lower_for_cuda_with_the_kernel_for_hopper(variant, collective):
    n, rows, heads, head_dim = 3, 128, (4, 2, 2), 64
    tokens = [jax.ShapeDtypeStruct((n, rows, count, head_dim), jnp.bfloat16) for count in heads]
    exported = jax.export.export(
        ring_over(mesh_of(n), variant, implementation="mosaic_gpu"),
        platforms=["cuda"],
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")],
    )(*tokens, jax.ShapeDtypeStruct((n, rows), jnp.int32))
    module = exported.mlir_module()
    assert f"stablehlo.{collective}" in module
    assert module.count("custom_call @mosaic_gpu_v2") == 1, "lowered once, called in every step"
