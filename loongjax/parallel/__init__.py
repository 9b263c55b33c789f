"""Sequence parallelism: ring attention over a striped layout, KV retention, multi-master decode.

The ops are called inside a `jax.shard_map`, anybody's, with the name of one mesh axis; what makes and undoes the layout
(`stripe` and others), before and after it.
"""

from loongjax.parallel.multi_master import multi_master_decode as multi_master_decode
from loongjax.parallel.retention import retain as retain
from loongjax.parallel.ring import RING_COMPILER_OPTIONS as RING_COMPILER_OPTIONS
from loongjax.parallel.ring import ring_attention as ring_attention
from loongjax.parallel.striped import PADDING_ROW as PADDING_ROW
from loongjax.parallel.striped import stripe as stripe
from loongjax.parallel.striped import stripe_row_starts as stripe_row_starts
from loongjax.parallel.striped import unstripe as unstripe
