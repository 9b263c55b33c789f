"""The Triton kernels of the exchange ops; `workspace` says by which rules they pass messages.

Every kernel takes a group: int32 words [n + 1, 3], of which the first row begins with this device's own rank, and row
r + 1 is rank r's number among the devices and the two halves of its workspace's address, the lower one first.

A message of more than one chunk a program takes several rounds: chunk c is that of program c % programs in round
c // programs.
"""

from typing import no_type_check

import triton
import triton.language as tl

from loongjax.pallas_kernels.exchange import workspace

BUFFER_BYTES = tl.constexpr(workspace.BUFFER_BYTES)
BUFFERS = tl.constexpr(workspace.BUFFERS)
COUNTS = tl.constexpr(workspace.COUNTS)
FLAGS = tl.constexpr(workspace.FLAGS)
MAX_DEVICES = tl.constexpr(workspace.MAX_DEVICES)
MAX_PROGRAMS = tl.constexpr(workspace.MAX_PROGRAMS)
MESSAGE_BYTES = tl.constexpr(workspace.MESSAGE_BYTES)
NUMBER_MASK = tl.constexpr(workspace.NUMBER_MASK)
POLL_LIMIT = tl.constexpr(workspace.POLL_LIMIT)
SECTOR_BYTES = tl.constexpr(workspace.SECTOR_BYTES)
STATUS = tl.constexpr(workspace.STATUS)


@triton.jit
@no_type_check
def reduce_kernel(
    x_ptr,  # [size]
    group_ptr,  # uint32 [n + 1, 3]
    out_ptr,  # [size]
    size: tl.constexpr,
    num_ranks: tl.constexpr,
    padded_ranks: tl.constexpr,
    block: tl.constexpr,
    num_rounds: tl.constexpr,
):
    """The sum over ranks, in rank order from 0 in float32 on every rank. Grid: chunks of a round."""
    dtype = x_ptr.dtype.element_ty
    rank = tl.load(group_ptr).to(tl.int32)
    place = tl.arange(0, block)
    for round in range(num_rounds):
        start = (round * tl.num_programs(0) + tl.program_id(0)) * block
        is_there = start + place < size
        own = tl.load(x_ptr + start + place, mask=is_there)
        outboxes = all_outboxes(group_ptr, rank, round, num_ranks)
        for i in tl.static_range(1, num_ranks):
            tl.store(pointer(outboxes[i - 1], dtype) + place, own, mask=is_there)
        signal_and_wait(group_ptr, rank, round, num_ranks, padded_ranks)
        inboxes = all_inboxes(group_ptr, rank, round, num_ranks)
        total = tl.zeros([block], tl.float32)
        for r in tl.static_range(num_ranks):
            message = pointer(inboxes[r], dtype) + place
            received = tl.load(message, mask=is_there & (r != rank), other=0.0, cache_modifier=".cg")
            total += tl.where(r == rank, own, received).to(tl.float32)
        tl.store(out_ptr + start + place, total.to(dtype), mask=is_there)
    count_messages(group_ptr, rank, num_rounds, num_ranks, padded_ranks)


@triton.jit
@no_type_check
def gather_kernel(
    x_ptr,  # [size]
    group_ptr,  # uint32 [n + 1, 3]
    out_ptr,  # [n, size]
    size: tl.constexpr,
    num_ranks: tl.constexpr,
    padded_ranks: tl.constexpr,
    block: tl.constexpr,
    num_rounds: tl.constexpr,
):
    """What every rank has, by rank. Grid: chunks of a round."""
    dtype = x_ptr.dtype.element_ty
    rank = tl.load(group_ptr).to(tl.int32)
    place = tl.arange(0, block)
    for round in range(num_rounds):
        start = (round * tl.num_programs(0) + tl.program_id(0)) * block
        is_there = start + place < size
        own = tl.load(x_ptr + start + place, mask=is_there)
        outboxes = all_outboxes(group_ptr, rank, round, num_ranks)
        for i in tl.static_range(1, num_ranks):
            tl.store(pointer(outboxes[i - 1], dtype) + place, own, mask=is_there)
        signal_and_wait(group_ptr, rank, round, num_ranks, padded_ranks)
        inboxes = all_inboxes(group_ptr, rank, round, num_ranks)
        for r in tl.static_range(num_ranks):
            message = pointer(inboxes[r], dtype) + place
            received = tl.load(message, mask=is_there & (r != rank), other=0, cache_modifier=".cg")
            tl.store(out_ptr + r * size + start + place, tl.where(r == rank, own, received), mask=is_there)
    count_messages(group_ptr, rank, num_rounds, num_ranks, padded_ranks)


@triton.jit
@no_type_check
def merge_kernel(
    o_ptr,  # float32 [n, rows, H]: this rank's partial outputs for the rows of every rank
    lse_ptr,  # float32 [n, rows]
    group_ptr,  # uint32 [n + 1, 3]
    merged_o_ptr,  # [rows, H]: of this rank's rows
    merged_lse_ptr,  # float32 [rows]
    num_rows: tl.constexpr,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
    num_ranks: tl.constexpr,
    padded_ranks: tl.constexpr,
    block: tl.constexpr,  # rows of a chunk
    num_rounds: tl.constexpr,
):
    """Sends every rank the partial outputs of its rows, and merges what arrives. Grid: chunks of a round."""
    rank = tl.load(group_ptr).to(tl.int32)
    dim = tl.arange(0, padded_dim)
    message_row = tl.arange(0, block)
    place = message_row[:, None] * padded_dim + dim[None, :]
    for round in range(num_rounds):
        row = (round * tl.num_programs(0) + tl.program_id(0)) * block + message_row
        is_row = row < num_rows
        is_there = is_row[:, None] & (dim[None, :] < head_dim)
        element = row[:, None] * head_dim + dim[None, :]
        outboxes = all_outboxes(group_ptr, rank, round, num_ranks)
        for i in tl.static_range(1, num_ranks):
            first_row = ((rank + i) % num_ranks).to(tl.int64) * num_rows
            o = tl.load(o_ptr + first_row * head_dim + element, mask=is_there)
            lse = tl.load(lse_ptr + first_row + row, mask=is_row)
            tl.store(pointer(outboxes[i - 1], tl.float32) + place, o, mask=is_there)
            tl.store(pointer(outboxes[i - 1] + MESSAGE_BYTES, tl.float32) + message_row, lse, mask=is_row)
        signal_and_wait(group_ptr, rank, round, num_ranks, padded_ranks)
        inboxes = all_inboxes(group_ptr, rank, round, num_ranks)
        own_row = rank.to(tl.int64) * num_rows
        own_lse = tl.load(lse_ptr + own_row + row, mask=is_row, other=float("-inf"))
        base = own_lse
        lses = ()
        for r in tl.static_range(num_ranks):
            message = pointer(inboxes[r] + MESSAGE_BYTES, tl.float32) + message_row
            received = tl.load(message, mask=is_row & (r != rank), other=float("-inf"), cache_modifier=".cg")
            lses += (tl.where(r == rank, own_lse, received),)
            base = tl.maximum(base, lses[r])
        base = tl.where(base == float("-inf"), 0.0, base)
        total = tl.zeros([block], tl.float32)
        weighted = tl.zeros([block, padded_dim], tl.float32)
        for r in tl.static_range(num_ranks):
            weight = tl.exp(lses[r] - base)
            message = pointer(inboxes[r], tl.float32) + place
            received = tl.load(message, mask=is_there & (r != rank), other=0.0, cache_modifier=".cg")
            own_o = tl.load(o_ptr + own_row * head_dim + element, mask=is_there & (r == rank), other=0.0)
            o = tl.where(r == rank, own_o, received)
            # A part without keys may be anything, NaN too.
            weighted += tl.where(weight[:, None] > 0, weight[:, None] * o, 0.0)
            total += weight
        divisor = tl.where(total > 0, total, 1.0)
        merged = weighted / divisor[:, None]
        tl.store(merged_o_ptr + element, merged.to(merged_o_ptr.dtype.element_ty), mask=is_there)
        merged_lse = tl.where(total > 0, base + tl.log(divisor), float("-inf"))
        tl.store(merged_lse_ptr + row, merged_lse, mask=is_row)
    count_messages(group_ptr, rank, num_rounds, num_ranks, padded_ranks)


@triton.jit
@no_type_check
def status_kernel(
    after_ptr,  # not read: what must be there before
    group_ptr,  # uint32 [n + 1, 3]
    status_ptr,  # int32 [1]
):
    """This device's status word. Grid: 1."""
    own = workspace_of(group_ptr, tl.load(group_ptr).to(tl.int32))
    tl.store(status_ptr, tl.load(pointer(own + STATUS, tl.int32), volatile=True))


@triton.jit
@no_type_check
def signal_and_wait(group_ptr, rank, round, num_ranks: tl.constexpr, padded_ranks: tl.constexpr):
    """Tells the peers that this round's message is with them, and waits for theirs."""
    own = workspace_of(group_ptr, rank)
    own_device = device_of(group_ptr, rank)
    ranks = tl.arange(0, padded_ranks)
    is_peer = (ranks < num_ranks) & (ranks != rank)
    peers = tl.minimum(ranks, num_ranks - 1)
    devices = device_of(group_ptr, peers)
    theirs = workspace_of(group_ptr, peers)
    numbers = message_number(own, devices, round)
    poll_limit = tl.load((own + POLL_LIMIT).to(tl.pointer_type(tl.int32)))
    status_word = (own + STATUS).to(tl.pointer_type(tl.int32))
    status = tl.load(status_word, volatile=True)
    # All of this program's threads have written their parts of the messages.
    tl.debug_barrier()
    has_failed = status != 0
    news = tl.zeros([padded_ranks], tl.int32) + status
    their_status = (theirs + STATUS).to(tl.pointer_type(tl.int32))
    tl.atomic_xchg(their_status, news, mask=is_peer & has_failed, sem="release", scope="sys")
    their_flags = (theirs + FLAGS + channel(own_device) * SECTOR_BYTES).to(tl.pointer_type(tl.int32))
    tl.atomic_xchg(their_flags, numbers, mask=is_peer, sem="release", scope="sys")
    own_flags = (own + FLAGS + channel(devices) * SECTOR_BYTES).to(tl.pointer_type(tl.int32))
    before = (numbers - 1) & NUMBER_MASK
    num_polls = 0
    num_missing = tl.where(has_failed, 0, num_ranks - 1)
    is_missing = is_peer
    while (num_missing > 0) & (num_polls < poll_limit):
        flags = tl.atomic_add(own_flags, 0, mask=is_peer, sem="acquire", scope="sys")
        is_missing = is_peer & (flags == before)
        num_missing = tl.sum(is_missing.to(tl.int32), axis=0)
        num_polls += 1
    if num_missing > 0:
        missing = tl.min(tl.where(is_missing, devices, MAX_DEVICES), axis=0)
        number = tl.max(tl.where(is_missing & (devices == missing), numbers, 0), axis=0)
        failure = (missing + 1) | (own_device << 8) | ((number & 0x7FFF) << 16)
        tl.atomic_xchg(status_word, failure, sem="relaxed", scope="sys")
    # What one thread has acquired, all may read.
    tl.debug_barrier()


@triton.jit
@no_type_check
def count_messages(group_ptr, rank, num_rounds, num_ranks: tl.constexpr, padded_ranks: tl.constexpr):
    """Counts a message a round with every peer; the last thing that a program does."""
    ranks = tl.arange(0, padded_ranks)
    devices = device_of(group_ptr, tl.minimum(ranks, num_ranks - 1))
    own = workspace_of(group_ptr, rank)
    counts = (own + COUNTS + channel(devices) * 4).to(tl.pointer_type(tl.int32))
    is_peer = (ranks < num_ranks) & (ranks != rank)
    last_numbers = message_number(own, devices, num_rounds - 1)
    # All threads have read the counts.
    tl.debug_barrier()
    tl.store(counts, last_numbers, mask=is_peer)


@triton.jit
@no_type_check
def all_outboxes(group_ptr, rank, round, num_ranks: tl.constexpr):
    """Addresses of the buffers for this round's messages to ranks rank + 1, rank + 2 and so on."""
    own = workspace_of(group_ptr, rank)
    own_channel = channel(device_of(group_ptr, rank))
    addresses = ()
    for i in tl.static_range(1, num_ranks):
        peer = (rank + i) % num_ranks
        number = message_number(own, device_of(group_ptr, peer), round)
        place = (own_channel * 2 + number % 2) * BUFFER_BYTES
        addresses += (workspace_of(group_ptr, peer) + BUFFERS + place,)
    return addresses


@triton.jit
@no_type_check
def all_inboxes(group_ptr, rank, round, num_ranks: tl.constexpr):
    """Addresses of the buffers of this round's messages from ranks 0, 1 and so on."""
    own = workspace_of(group_ptr, rank)
    addresses = ()
    for r in tl.static_range(num_ranks):
        device = device_of(group_ptr, r)
        number = message_number(own, device, round)
        addresses += (own + BUFFERS + (channel(device) * 2 + number % 2) * BUFFER_BYTES,)
    return addresses


@triton.jit
@no_type_check
def message_number(own, device, round):
    """Of this round's message to and from a device."""
    count = tl.load((own + COUNTS + channel(device) * 4).to(tl.pointer_type(tl.int32)))
    return (count + round + 1) & NUMBER_MASK


@triton.jit
@no_type_check
def channel(device):
    """The place of this program's channel with a device among all channels of a workspace."""
    return device.to(tl.int64) * MAX_PROGRAMS + tl.program_id(0)


@triton.jit
@no_type_check
def device_of(group_ptr, rank):
    """A rank's number among the devices."""
    return tl.load(group_ptr + 3 * rank + 3).to(tl.int32)


@triton.jit
@no_type_check
def workspace_of(group_ptr, rank):
    """The address of a rank's workspace."""
    low = tl.load(group_ptr + 3 * rank + 4).to(tl.uint64)
    high = tl.load(group_ptr + 3 * rank + 5).to(tl.uint64)
    return (low | (high << 32)).to(tl.int64)


@triton.jit
@no_type_check
def pointer(address, dtype: tl.constexpr):
    """To memory that is aligned for the widest loads and stores."""
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)
