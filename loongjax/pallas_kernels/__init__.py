"""The ops that need a kernel: each has a reference, which is its definition, and faster variants.

They run on any device and inside any `jax.shard_map`; nothing here knows of meshes or of the engine.
"""

from loongjax.pallas_kernels.decode_attention.api import decode_attention as decode_attention
from loongjax.pallas_kernels.exchange import PeerMemory as PeerMemory
from loongjax.pallas_kernels.exchange import all_gather as all_gather
from loongjax.pallas_kernels.exchange import all_reduce as all_reduce
from loongjax.pallas_kernels.exchange import exchange_and_merge as exchange_and_merge
from loongjax.pallas_kernels.exchange import exchange_status as exchange_status
from loongjax.pallas_kernels.extend_attention.api import extend_attention as extend_attention
from loongjax.pallas_kernels.kv_update.api import kv_update as kv_update
from loongjax.pallas_kernels.merge import merge_attention as merge_attention
from loongjax.pallas_kernels.merge import merge_partials as merge_partials
from loongjax.pallas_kernels.prefill_attention.api import prefill_attention as prefill_attention
from loongjax.pallas_kernels.projection.api import project as project
from loongjax.pallas_kernels.projection.api import project_gated as project_gated
