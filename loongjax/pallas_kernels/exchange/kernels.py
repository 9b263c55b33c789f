"""The Triton kernels of the exchange ops; `workspace` says by which rules they pass messages.

Every kernel takes a group, uint32 [2 n, 4]: for each of n ranks its rank, its number among the devices, and the two
halves of its workspace's address, the lower one first. The first n rows are in rank order, in which messages are read;
the others begin with this rank and go on round, in which they are sent, so that not all ranks send to one at a time.

A message of more than one chunk a program takes several rounds: chunk c is that of program c % programs in round
c // programs. What a round has to know is loaded before it sends anything: what was loaded between sending and reading
would be waited for by all ranks.
"""

from typing import no_type_check

import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

from loongjax.pallas_kernels.exchange import workspace

BUFFER_BYTES = tl.constexpr(workspace.BUFFER_BYTES)
BUFFERS = tl.constexpr(workspace.BUFFERS)
COUNTS = tl.constexpr(workspace.COUNTS)
FLAGS = tl.constexpr(workspace.FLAGS)
MAX_DEVICES = tl.constexpr(workspace.MAX_DEVICES)
MAX_PROGRAMS = tl.constexpr(workspace.MAX_PROGRAMS)
MOST_THREADS = tl.constexpr(1024)
MESSAGE_BYTES = tl.constexpr(workspace.MESSAGE_BYTES)
NUMBER_MASK = tl.constexpr(workspace.NUMBER_MASK)
POLLS_A_LOOK = tl.constexpr(workspace.POLLS_A_LOOK)
SECTOR_BYTES = tl.constexpr(workspace.SECTOR_BYTES)
STATUS = tl.constexpr(workspace.STATUS)
WAIT_LIMIT = tl.constexpr(workspace.WAIT_LIMIT)


@triton.jit
@no_type_check
def reduce_kernel(
    x_ptr,  # [size]
    group_ptr,  # uint32 [2 n, 4]
    out_ptr,  # [size]
    size: tl.constexpr,
    num_ranks: tl.constexpr,
    padded_ranks: tl.constexpr,
    block: tl.constexpr,
    num_rounds: tl.constexpr,
):
    """The sum over ranks, in rank order from 0 in float32 on every rank. Grid: chunks of a round."""
    dtype = x_ptr.dtype.element_ty
    rank = rank_of(group_ptr, num_ranks)
    link = open_link(group_ptr, num_ranks, padded_ranks)
    place = tl.arange(0, block)
    for round in range(num_rounds):
        start = (round * tl.num_programs(0) + tl.program_id(0)) * block
        is_there = start + place < size
        own = tl.load(x_ptr + start + place, mask=is_there, other=0.0)
        outboxes = all_outboxes(group_ptr, round, num_ranks)
        inboxes = all_inboxes(group_ptr, round, num_ranks)
        status = read_status(group_ptr, num_ranks)
        is_sent = is_there & (status == 0)
        for i in tl.static_range(num_ranks - 1):
            tl.store(pointer(outboxes[i], dtype) + place, own, mask=is_sent)
        signal_and_wait(link, status, round, group_ptr, num_ranks, padded_ranks)
        total = tl.zeros([block], tl.float32)
        for r in tl.static_range(num_ranks):
            message = pointer(inboxes[r], dtype) + place
            received = tl.load(message, mask=is_there & (r != rank), other=0.0, cache_modifier=".cg")
            total += tl.where(r == rank, own, received).to(tl.float32)
        tl.store(out_ptr + start + place, total.to(dtype), mask=is_there)
    close_link(link, num_rounds)


@triton.jit
@no_type_check
def gather_kernel(
    x_ptr,  # [size]
    group_ptr,  # uint32 [2 n, 4]
    out_ptr,  # [n, size]
    size: tl.constexpr,
    num_ranks: tl.constexpr,
    padded_ranks: tl.constexpr,
    block: tl.constexpr,
    num_rounds: tl.constexpr,
):
    """What every rank has, by rank. Grid: chunks of a round."""
    dtype = x_ptr.dtype.element_ty
    rank = rank_of(group_ptr, num_ranks)
    link = open_link(group_ptr, num_ranks, padded_ranks)
    place = tl.arange(0, block)
    for round in range(num_rounds):
        start = (round * tl.num_programs(0) + tl.program_id(0)) * block
        is_there = start + place < size
        own = tl.load(x_ptr + start + place, mask=is_there, other=0)
        outboxes = all_outboxes(group_ptr, round, num_ranks)
        inboxes = all_inboxes(group_ptr, round, num_ranks)
        status = read_status(group_ptr, num_ranks)
        is_sent = is_there & (status == 0)
        for i in tl.static_range(num_ranks - 1):
            tl.store(pointer(outboxes[i], dtype) + place, own, mask=is_sent)
        signal_and_wait(link, status, round, group_ptr, num_ranks, padded_ranks)
        for r in tl.static_range(num_ranks):
            message = pointer(inboxes[r], dtype) + place
            received = tl.load(message, mask=is_there & (r != rank), other=0, cache_modifier=".cg")
            tl.store(out_ptr + r * size + start + place, tl.where(r == rank, own, received), mask=is_there)
    close_link(link, num_rounds)


@triton.jit
@no_type_check
def merge_kernel(
    o_ptr,  # float32 [n, rows, H]: this rank's partial outputs for the rows of every rank
    lse_ptr,  # float32 [n, rows]
    group_ptr,  # uint32 [2 n, 4]
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
    rank = rank_of(group_ptr, num_ranks)
    link = open_link(group_ptr, num_ranks, padded_ranks)
    dim = tl.arange(0, padded_dim)
    message_row = tl.arange(0, block)
    place = message_row[:, None] * padded_dim + dim[None, :]
    own_row = rank.to(tl.int64) * num_rows
    for round in range(num_rounds):
        row = (round * tl.num_programs(0) + tl.program_id(0)) * block + message_row
        is_row = row < num_rows
        is_there = is_row[:, None] & (dim[None, :] < head_dim)
        element = row[:, None] * head_dim + dim[None, :]
        outboxes = all_outboxes(group_ptr, round, num_ranks)
        inboxes = all_inboxes(group_ptr, round, num_ranks)
        status = read_status(group_ptr, num_ranks)
        for i in tl.static_range(num_ranks - 1):
            first_row = ((rank + i + 1) % num_ranks).to(tl.int64) * num_rows
            sent_o = tl.load(o_ptr + first_row * head_dim + element, mask=is_there)
            sent_lse = tl.load(lse_ptr + first_row + row, mask=is_row)
            is_sent = status == 0
            tl.store(pointer(outboxes[i], tl.float32) + place, sent_o, mask=is_there & is_sent)
            tl.store(pointer(outboxes[i] + MESSAGE_BYTES, tl.float32) + message_row, sent_lse, mask=is_row & is_sent)
        own_lse = tl.load(lse_ptr + own_row + row, mask=is_row, other=float("-inf"))
        own_o = tl.load(o_ptr + own_row * head_dim + element, mask=is_there, other=0.0)
        signal_and_wait(link, status, round, group_ptr, num_ranks, padded_ranks)
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
            o = tl.where(r == rank, own_o, received)
            # A part without keys may be anything, NaN too.
            weighted += tl.where(weight[:, None] > 0, weight[:, None] * o, 0.0)
            total += weight
        divisor = tl.where(total > 0, total, 1.0)
        merged = weighted / divisor[:, None]
        tl.store(merged_o_ptr + element, merged.to(merged_o_ptr.dtype.element_ty), mask=is_there)
        merged_lse = tl.where(total > 0, base + tl.log(divisor), float("-inf"))
        tl.store(merged_lse_ptr + row, merged_lse, mask=is_row)
    close_link(link, num_rounds)


@triton.jit
@no_type_check
def status_kernel(
    after_ptr,  # not read: what must be there before
    group_ptr,  # uint32 [2 n, 4]
    status_ptr,  # int32 [1]
    num_ranks: tl.constexpr,
):
    """This device's status word. Grid: 1."""
    tl.store(status_ptr, read_status(group_ptr, num_ranks))


@triton.jit
@no_type_check
def open_link(group_ptr, num_ranks: tl.constexpr, padded_ranks: tl.constexpr):
    """What `signal_and_wait` has to know of the ranks, this one first, as vectors: whether one is a peer, the count of
    messages exchanged with it and where that is kept, the flag there and the flag here, and its status word."""
    places = tl.arange(0, padded_ranks)
    is_peer = (places > 0) & (places < num_ranks)
    rows = num_ranks + tl.minimum(places, num_ranks - 1)
    own = workspace_of(group_ptr, num_ranks)
    own_channel = channel(device_of(group_ptr, num_ranks))
    channels = channel(device_of(group_ptr, rows))
    theirs = workspace_of(group_ptr, rows)
    counters = (own + COUNTS + channels * 4).to(tl.pointer_type(tl.int32))
    counts = tl.load(counters)
    their_flags = (theirs + FLAGS + own_channel * SECTOR_BYTES).to(tl.pointer_type(tl.int32))
    own_flags = (own + FLAGS + channels * SECTOR_BYTES).to(tl.pointer_type(tl.int32))
    their_statuses = (theirs + STATUS).to(tl.pointer_type(tl.int32))
    wait_limit = tl.load((own + WAIT_LIMIT).to(tl.pointer_type(tl.int32)))
    return is_peer, counts, counters, their_flags, own_flags, their_statuses, wait_limit


@triton.jit
@no_type_check
def signal_and_wait(link, status, round, group_ptr, num_ranks: tl.constexpr, padded_ranks: tl.constexpr):
    """Tells the peers that this round's message is with them, and waits for theirs."""
    is_peer, counts, _, their_flags, own_flags, their_statuses, wait_limit = link
    numbers = (counts + round + 1) & NUMBER_MASK
    before = (counts + round) & NUMBER_MASK
    has_failed = status != 0
    # All of this program's threads have written their parts of the messages.
    tl.debug_barrier()
    news = tl.zeros([padded_ranks], tl.int32) + status
    tl.atomic_xchg(their_statuses, news, mask=is_peer & has_failed, sem="release", scope="sys")
    tl.atomic_xchg(their_flags, numbers, mask=is_peer, sem="release", scope="sys")
    num_polls = 0
    began = tl.cast(0, tl.int64)
    waited = tl.cast(0, tl.int64)
    num_missing = tl.where(has_failed, 0, num_ranks - 1)
    is_missing = is_peer
    while (num_missing > 0) & (waited < wait_limit):
        flags = tl.atomic_add(own_flags, 0, mask=is_peer, sem="acquire", scope="sys")
        is_missing = is_peer & (flags == before)
        num_missing = tl.sum(is_missing.to(tl.int32), axis=0)
        num_polls += 1
        if num_polls % POLLS_A_LOOK == 0:
            now = clock_us()
            began = tl.where(began == 0, now, began)
            waited = now - began
    if num_missing > 0:
        report_missing(is_missing, numbers, group_ptr, num_ranks, padded_ranks)
    # What one thread has acquired, all may read.
    tl.debug_barrier()


@triton.jit
@no_type_check
def clock_us():
    """int64, the same for all warps: each reads a clock of its own, and those that end a wait earlier than others would
    be at other barriers."""
    return tl.max(tl.zeros([MOST_THREADS], tl.int64) + globaltimer() // 1000, axis=0)


@triton.jit
@no_type_check
def report_missing(is_missing, numbers, group_ptr, num_ranks: tl.constexpr, padded_ranks: tl.constexpr):
    """Sets this device's status: it has waited long enough."""
    rows = num_ranks + tl.minimum(tl.arange(0, padded_ranks), num_ranks - 1)
    devices = device_of(group_ptr, rows)
    missing = tl.min(tl.where(is_missing, devices, MAX_DEVICES), axis=0)
    number = tl.max(tl.where(is_missing & (devices == missing), numbers, 0), axis=0)
    failure = (missing + 1) | (device_of(group_ptr, num_ranks) << 8) | ((number & 0x7FFF) << 16)
    status = (workspace_of(group_ptr, num_ranks) + STATUS).to(tl.pointer_type(tl.int32))
    tl.atomic_xchg(status, failure, sem="relaxed", scope="sys")


@triton.jit
@no_type_check
def close_link(link, num_rounds):
    """Counts a message a round with every peer, once all threads have loaded the counts."""
    is_peer, counts, counters, _, _, _, _ = link
    tl.store(counters, (counts + num_rounds) & NUMBER_MASK, mask=is_peer)


@triton.jit
@no_type_check
def all_outboxes(group_ptr, round, num_ranks: tl.constexpr):
    """Addresses of the buffers for this round's messages to the ranks after this one."""
    own = workspace_of(group_ptr, num_ranks)
    own_channel = channel(device_of(group_ptr, num_ranks))
    addresses = ()
    for i in tl.static_range(1, num_ranks):
        buffer = own_channel * 2 + message_number(own, device_of(group_ptr, num_ranks + i), round) % 2
        addresses += (workspace_of(group_ptr, num_ranks + i) + BUFFERS + buffer * BUFFER_BYTES,)
    return addresses


@triton.jit
@no_type_check
def all_inboxes(group_ptr, round, num_ranks: tl.constexpr):
    """Addresses of the buffers of this round's messages from ranks 0, 1 and so on."""
    own = workspace_of(group_ptr, num_ranks)
    addresses = ()
    for r in tl.static_range(num_ranks):
        device = device_of(group_ptr, r)
        buffer = channel(device) * 2 + message_number(own, device, round) % 2
        addresses += (own + BUFFERS + buffer * BUFFER_BYTES,)
    return addresses


@triton.jit
@no_type_check
def message_number(own, device, round):
    """Of this round's message to and from a device."""
    count = tl.load((own + COUNTS + channel(device) * 4).to(tl.pointer_type(tl.int32)))
    return (count + round + 1) & NUMBER_MASK


@triton.jit
@no_type_check
def read_status(group_ptr, num_ranks: tl.constexpr):
    """This device's status word as it is now."""
    status = (workspace_of(group_ptr, num_ranks) + STATUS).to(tl.pointer_type(tl.int32))
    return tl.load(status, volatile=True)


@triton.jit
@no_type_check
def channel(device):
    """The place of this program's channel with a device among all channels of a workspace."""
    return device.to(tl.int64) * MAX_PROGRAMS + tl.program_id(0)


@triton.jit
@no_type_check
def rank_of(group_ptr, num_ranks: tl.constexpr):
    """This device's rank."""
    return tl.load(group_ptr + 4 * num_ranks).to(tl.int32)


@triton.jit
@no_type_check
def device_of(group_ptr, row):
    """The number among the devices of the rank in a row of the group."""
    return tl.load(group_ptr + 4 * row + 1).to(tl.int32)


@triton.jit
@no_type_check
def workspace_of(group_ptr, row):
    """The address of the workspace of the rank in a row of the group."""
    low = tl.load(group_ptr + 4 * row + 2).to(tl.uint64)
    high = tl.load(group_ptr + 4 * row + 3).to(tl.uint64)
    return (low | (high << 32)).to(tl.int64)


@triton.jit
@no_type_check
def pointer(address, dtype: tl.constexpr):
    """To memory that is aligned for the widest loads and stores."""
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)
