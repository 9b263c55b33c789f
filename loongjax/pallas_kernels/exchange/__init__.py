"""The small collectives of decode, between the GPUs of one process."""

from loongjax.pallas_kernels.exchange.api import all_gather as all_gather
from loongjax.pallas_kernels.exchange.api import all_reduce as all_reduce
from loongjax.pallas_kernels.exchange.api import exchange_and_merge as exchange_and_merge
from loongjax.pallas_kernels.exchange.api import exchange_status as exchange_status
from loongjax.pallas_kernels.exchange.peers import PeerMemory as PeerMemory
