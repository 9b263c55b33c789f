"""With peers, a group's programs lower for CUDA to the exchange kernels, as few as a layer needs, and to no collective
of XLA's where messages are small."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from loongjax.core.cluster import Group
from loongjax.models.config import ModelConfig
from loongjax.models.sharding import abstract_params
from loongjax.pallas_kernels.extend_attention import api as extend_api
from loongjax.pallas_kernels.kv_update import api as kv_update_api
from loongjax.pallas_kernels.prefill_attention import api as prefill_api
from loongjax.parallel.mesh import DeviceGrid
from loongjax.runtime.buckets import Buckets
from loongjax.runtime.kv_pool import KV_POOL_SPEC
from loongjax.runtime.model_spec import ModelSpec
from loongjax.runtime.packing import empty_decode, empty_extend, empty_prefill
from loongjax.runtime.programs import BY_RANK, LOGITS_SPEC, REPLICATED, decode_step, extend_step, prefill_step
from loongjax.runtime.sampling import TIERS, build_rows, sample_step

TRITON_CALL = jax.export.DisabledSafetyCheck.custom_call("triton_kernel_call_ffi")
NUM_LAYERS = 3
CONFIG = ModelConfig(
    hidden_size=128,
    num_layers=NUM_LAYERS,
    num_q_heads=8,
    num_kv_heads=4,
    head_dim=64,
    intermediate_size=256,
    vocab_size=512,
    max_position_embeddings=1024,
    dtype="bfloat16",
)
ROWS, NUM_PAGES, PAGE_SIZE = 3, 8, 16
BUCKETS = Buckets.for_limits(max_num_batched_tokens=4096, max_num_seqs=ROWS, num_pages=NUM_PAGES)


class Lowering:
    """Programs of one group, on devices that are not the first, with arrays that are only described."""

    def __init__(self, tp: int, *, num_instances: int = 2, has_peers: bool = True) -> None:
        group = Group.of(range(num_instances))
        self.mesh: Mesh = DeviceGrid(jax.devices()[8 - num_instances * tp :], tp=tp).mesh(group)
        self.spec = ModelSpec(CONFIG, "bfloat16", tp)
        self.peers = self.described((num_instances, tp, 3), "uint32", REPLICATED) if has_peers else None
        leaves = jax.tree.leaves(abstract_params(CONFIG, dtype=jnp.dtype("bfloat16"), tp=tp))
        self.weights = tuple(
            self.described(leaf.shape, leaf.dtype, cut)
            for leaf, cut in zip(leaves, self.spec.weight_specs, strict=True)
        )
        pool_shape = (num_instances, NUM_LAYERS, 2, NUM_PAGES, PAGE_SIZE, CONFIG.num_kv_heads, CONFIG.head_dim)
        self.pool = self.described(pool_shape, "bfloat16", KV_POOL_SPEC)

    def described(self, shape: tuple[int, ...], dtype: Any, cut: PartitionSpec = BY_RANK) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, cut))

    def by_rank(self, tree: Any) -> Any:
        return jax.tree.map(lambda leaf: self.described(leaf.shape, leaf.dtype), tree)

    def decode(self) -> str:
        state = self.by_rank(empty_decode(2, ROWS, BUCKETS))
        rows = self.described((2, ROWS), "int32")
        return self.lower(decode_step, self.spec, self.weights, self.pool, state, rows, rows, self.peers)

    def prefill(self, num_tokens: int) -> str:
        batch = self.by_rank(empty_prefill(2, num_tokens, BUCKETS))
        return self.lower(prefill_step, self.spec, self.weights, self.pool, batch, self.peers)

    def extend(self, num_tokens: int) -> str:
        batch = self.by_rank(empty_extend(num_tokens, ROWS, BUCKETS))
        return self.lower(extend_step, self.spec, self.weights, self.pool, batch, self.peers)

    def sample(self) -> str:
        greedy = TIERS[0]
        _, rows = build_rows([[], []], ROWS, greedy)
        logits = self.described((2, ROWS, CONFIG.vocab_size), "float32", LOGITS_SPEC)
        positions = self.described((2, ROWS), "int32")
        return self.lower(sample_step, greedy, logits, positions, self.by_rank(rows), None, self.peers)

    def collectives(self, module: str) -> set[str]:
        """XLA's, but for those over an axis of one device, which it leaves out."""
        found = set()
        for line in module.splitlines():
            if match := re.search(r'"stablehlo\.(\w+)".*(replica_groups|source_target_pairs)', line):
                axes = re.findall(r'axis_ref<name = "(\w+)">', line)
                if "tensor<1x1xi64>" in line:
                    continue
                if not axes or any(self.mesh.shape[axis] > 1 for axis in axes):
                    found.add(match[1])
        return found

    def lower(self, program: Any, *arguments: Any) -> str:
        """The module that GPUs would be given."""
        with jax.set_mesh(self.mesh):
            exported = jax.export.export(program, platforms=["cuda"], disabled_checks=[TRITON_CALL])
            return exported(*arguments).mlir_module()


def num_kernels(module: str) -> int:
    return module.count("custom_call @triton_kernel_call_ffi")


@pytest.fixture(scope="module", params=[1, 2], ids="tp{}".format)
def lowering(request) -> Lowering:
    return Lowering(request.param)


def sums_of_tp(lowering: Lowering, num_layers: int = NUM_LAYERS) -> int:
    """Of the embedding, and of attention's and the feed-forward's output in every layer."""
    return 1 + 2 * num_layers if lowering.spec.tp > 1 else 0


def test_a_decode_exchanges_by_kernels_alone(lowering):
    """Queries out and partial outputs back: two kernels a layer for the masters."""
    module = lowering.decode()
    assert num_kernels(module) == sums_of_tp(lowering) + 2 * NUM_LAYERS
    assert lowering.collectives(module) == set()


def test_a_short_prefill_sums_by_kernels_and_tells_how_they_went(lowering):
    module = lowering.prefill(64)
    assert num_kernels(module) == sums_of_tp(lowering) + 1
    assert "all_reduce" not in lowering.collectives(module)


def test_a_long_prefill_leaves_its_sums_to_xla(lowering):
    module = lowering.prefill(16_448)
    assert num_kernels(module) == 1
    assert ("all_reduce" in lowering.collectives(module)) == (lowering.spec.tp > 1)


def test_the_sampler_gathers_its_logits_by_a_kernel_and_tells_how_all_went(lowering):
    module = lowering.sample()
    assert num_kernels(module) == (2 if lowering.spec.tp > 1 else 1)
    assert lowering.collectives(module) == set()


@pytest.mark.parametrize("tp", [1, 2])
def test_an_extend_sums_by_kernels_and_tells_how_they_went(tp):
    """Its attention is one instance's own."""
    lowering = Lowering(tp, num_instances=1)
    module = lowering.extend(64)
    assert num_kernels(module) == sums_of_tp(lowering) + 1
    assert lowering.collectives(module) == set()
    assert_in_one_order(module)


def test_an_extend_attends_and_keeps_its_keys_by_kernels_where_there_are_some(monkeypatch):
    """In the text there is a function of two for the keys before, one of one for the chunks among themselves, and one
    kernel a layer that keeps their keys."""
    for api in (extend_api, prefill_api):
        monkeypatch.setattr(api, "default_variant", lambda *arguments, **settings: "triton")
    monkeypatch.setattr(kv_update_api, "is_triton_usable", lambda: True)
    lowering = Lowering(2, num_instances=1)
    assert num_kernels(lowering.extend(128)) == sums_of_tp(lowering) + 1 + 2 + 1 + NUM_LAYERS


def test_without_peers_there_are_only_xlas_collectives():
    lowering = Lowering(2, has_peers=False)
    for module in (lowering.decode(), lowering.prefill(64), lowering.sample()):
        assert num_kernels(module) == 0
        assert lowering.collectives(module) & {"all_reduce", "all_gather"}


@pytest.mark.parametrize("name", ["decode", "prefill"])
def test_every_exchange_takes_in_something_of_the_one_before(name):
    """Else XLA could run two at once, or in other orders on two devices."""
    lowering = Lowering(2)
    module = lowering.decode() if name == "decode" else lowering.prefill(64)
    assert_in_one_order(module)


def assert_in_one_order(module: str) -> None:
    """In the text of a module, every kernel's operands follow from the results of the kernel before it."""
    for body in re.split(r"func\.func", module):
        follows: dict[str, int] = {}
        """By value, how many of the function's exchanges it follows from."""
        num_exchanges = 0
        for line in body.splitlines():
            match = re.match(r"\s*(%\w+)(?::\d+)? = (.*)", line)
            if match is None:
                continue
            result, rest = match.groups()
            operands = [operand.split("#")[0] for operand in re.findall(r"%\w+(?:#\d+)?", rest)]
            newest = max((follows.get(operand, 0) for operand in operands), default=0)
            if "@triton_kernel_call_ffi" in rest:
                assert newest == num_exchanges, line[:200]
                newest = num_exchanges = num_exchanges + 1
            follows[result] = newest
