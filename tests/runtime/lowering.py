"""A group's programs as GPUs would be given them, without a GPU."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from loongjax.core.cluster import Group
from loongjax.models.config import ModelConfig
from loongjax.models.sharding import abstract_params
from loongjax.parallel.mesh import DeviceGrid
from loongjax.runtime.buckets import Buckets
from loongjax.runtime.kv_pool import KV_POOL_SPEC
from loongjax.runtime.model_spec import ModelSpec
from loongjax.runtime.packing import empty_decode, empty_extend, empty_prefill
from loongjax.runtime.programs import BY_RANK, LOGITS_SPEC, REPLICATED, decode_step, extend_step, prefill_step
from loongjax.runtime.sampling import TIERS, build_rows, sample_step

CALLS = [jax.export.DisabledSafetyCheck.custom_call(name) for name in ("triton_kernel_call_ffi", "triton_kernel_call")]
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

    def __init__(
        self, tp: int, *, num_instances: int = 2, has_peers: bool = True, num_layers: int = NUM_LAYERS
    ) -> None:
        config = dataclasses.replace(CONFIG, num_layers=num_layers)
        group = Group.of(range(num_instances))
        self.num_instances = num_instances
        self.mesh: Mesh = DeviceGrid(jax.devices()[8 - num_instances * tp :], tp=tp).mesh(group)
        self.spec = ModelSpec(config, "bfloat16", tp)
        self.peers = self.described((num_instances, tp, 3), "uint32", REPLICATED) if has_peers else None
        leaves = jax.tree.leaves(abstract_params(config, dtype=jnp.dtype("bfloat16"), tp=tp))
        self.weights = tuple(
            self.described(leaf.shape, leaf.dtype, cut)
            for leaf, cut in zip(leaves, self.spec.weight_specs, strict=True)
        )
        pool_shape = (num_instances, num_layers, 2, NUM_PAGES, PAGE_SIZE, CONFIG.num_kv_heads, CONFIG.head_dim)
        self.pool = self.described(pool_shape, "bfloat16", KV_POOL_SPEC)

    def described(self, shape: tuple[int, ...], dtype: Any, cut: PartitionSpec = BY_RANK) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, cut))

    def by_rank(self, tree: Any) -> Any:
        return jax.tree.map(lambda leaf: self.described(leaf.shape, leaf.dtype), tree)

    def decode(self) -> str:
        state = self.by_rank(empty_decode(self.num_instances, ROWS, BUCKETS))
        rows = self.described((self.num_instances, ROWS), "int32")
        return self.lower(decode_step, self.spec, self.weights, self.pool, state, rows, rows, self.peers)

    def prefill(self, num_tokens: int) -> str:
        batch = self.by_rank(empty_prefill(self.num_instances, num_tokens, BUCKETS))
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
            exported = jax.export.export(program, platforms=["cuda"], disabled_checks=CALLS)
            return exported(*arguments).mlir_module()
