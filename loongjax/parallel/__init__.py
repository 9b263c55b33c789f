"""Sequence parallelism: ring attention over a striped layout, KV retention, multi-master decode.

Everything here is called inside a `jax.shard_map`, anybody's, with the name of one mesh axis.
"""

from loongjax.parallel.multi_master import multi_master_decode as multi_master_decode
from loongjax.parallel.retention import retain as retain
from loongjax.parallel.ring import RING_COMPILER_OPTIONS as RING_COMPILER_OPTIONS
from loongjax.parallel.ring import ring_attention as ring_attention
