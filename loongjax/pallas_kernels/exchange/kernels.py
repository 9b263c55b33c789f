"""The Triton kernels of the exchange ops; `workspace` says by which rules they pass messages.

Every kernel takes a group, uint32 [2 n, 4]: for each of n ranks its rank, its number among the devices, and the two
halves of its workspace's address, the lower one first. The first n rows are in rank order, in which messages are read;
the others begin with this rank and go on round, in which they are sent, so that not all ranks send to one at a time.

A message of more than one chunk a program takes several rounds: chunk c is that of program c % programs in round
c // programs.

Where there are fewer elements than threads, several threads have a copy of one, and while a message is on its way these
may be of different moments. So no thread reads what another one reads, or it does that as an element of its own.
"""

from typing import no_type_check

import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

from loongjax.pallas_kernels.exchange import workspace

BUFFER_BYTES = tl.constexpr(workspace.BUFFER_BYTES)
BUFFERS = tl.constexpr(workspace.BUFFERS)
COUNTS = tl.constexpr(workspace.COUNTS)
MAX_DEVICES = tl.constexpr(workspace.MAX_DEVICES)
MAX_PROGRAMS = tl.constexpr(workspace.MAX_PROGRAMS)
LEAST_WORD = tl.constexpr(-(2**31))
MESSAGE_BYTES = tl.constexpr(workspace.MESSAGE_BYTES)
MOST_THREADS = tl.constexpr(1024)
NUMBER_MASK = tl.constexpr(workspace.NUMBER_MASK)
ROW_WORDS = tl.constexpr(workspace.ROW_BYTES // 4)
PIECE_WORDS = tl.constexpr(8)
POLLS_A_LOOK = tl.constexpr(workspace.POLLS_A_LOOK)
STATUS = tl.constexpr(workspace.STATUS)
WAIT_LIMIT = tl.constexpr(workspace.WAIT_LIMIT)

# How a wait stands.
ARRIVED = tl.constexpr(0)
MISSING = tl.constexpr(1)
FAILED = tl.constexpr(2)


@triton.jit
@no_type_check
def reduce_kernel(
    x_ptr,  # [size]
    group_ptr,  # uint32 [2 n, 4]
    out_ptr,  # [size]
    size: tl.constexpr,
    num_ranks: tl.constexpr,
    block: tl.constexpr,
    num_rounds: tl.constexpr,
):
    """The sum over ranks, in rank order from 0 in float32 on every rank. Grid: chunks of a round."""
    dtype = x_ptr.dtype.element_ty
    rank = rank_of(group_ptr, num_ranks)
    counts = load_counts(group_ptr, num_ranks)
    place = tl.arange(0, block)
    for round in range(num_rounds):
        start = (round * tl.num_programs(0) + tl.program_id(0)) * block
        is_there = start + place < size
        is_sent = start + place < round_up(size)
        own = tl.load(x_ptr + start + place, mask=is_there, other=0.0)
        received, messages, are_sent = send_and_receive(
            encode(own), place, is_sent, rank, counts, round, group_ptr, num_ranks
        )
        total = tl.zeros([block], tl.float32)
        for r in tl.static_range(num_ranks):
            total += tl.where(r == rank, own, decode(received[r], dtype)).to(tl.float32)
        tl.store(out_ptr + start + place, total.to(dtype), mask=is_there)
        clear(messages, are_sent, num_ranks, round + 1 < num_rounds, group_ptr, num_ranks)
    store_counts(counts, num_rounds, group_ptr, num_ranks)


@triton.jit
@no_type_check
def gather_kernel(
    x_ptr,  # [size]
    group_ptr,  # uint32 [2 n, 4]
    out_ptr,  # [n, size]
    size: tl.constexpr,
    num_ranks: tl.constexpr,
    block: tl.constexpr,
    num_rounds: tl.constexpr,
):
    """What every rank has, by rank. Grid: chunks of a round."""
    dtype = x_ptr.dtype.element_ty
    rank = rank_of(group_ptr, num_ranks)
    counts = load_counts(group_ptr, num_ranks)
    place = tl.arange(0, block)
    for round in range(num_rounds):
        start = (round * tl.num_programs(0) + tl.program_id(0)) * block
        is_there = start + place < size
        is_sent = start + place < round_up(size)
        own = tl.load(x_ptr + start + place, mask=is_there, other=0)
        received, messages, are_sent = send_and_receive(
            encode(own), place, is_sent, rank, counts, round, group_ptr, num_ranks
        )
        for r in tl.static_range(num_ranks):
            x = tl.where(r == rank, own, decode(received[r], dtype))
            tl.store(out_ptr + r * size + start + place, x, mask=is_there)
        clear(messages, are_sent, num_ranks, round + 1 < num_rounds, group_ptr, num_ranks)
    store_counts(counts, num_rounds, group_ptr, num_ranks)


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
    block: tl.constexpr,  # rows of a chunk
    copies: tl.constexpr,  # of what is said of a row, for as many threads, at least two
    num_rounds: tl.constexpr,
):
    """Sends every rank the partial outputs of its rows, and merges what arrives. Grid: chunks of a round.

    Where the merged output has 16 bits, partial ones travel as float16, in units of the largest of their row, off by
    2^-12 of it at most.
    """
    out_dtype = merged_o_ptr.dtype.element_ty
    sent_dtype = tl.float16 if out_dtype.primitive_bitwidth == 16 else tl.float32
    rank = rank_of(group_ptr, num_ranks)
    counts = load_counts(group_ptr, num_ranks)
    dim = tl.arange(0, padded_dim)
    message_row = tl.arange(0, block)
    place = message_row[:, None] * padded_dim + dim[None, :]
    copy = tl.arange(0, copies)
    is_lse = copy[None, :] % 2 == 0
    row_place = message_row[:, None] * ROW_WORDS + copy[None, :] % 2
    own_row = rank.to(tl.int64) * num_rows
    for round in range(num_rounds):
        row = (round * tl.num_programs(0) + tl.program_id(0)) * block + message_row
        is_row = row < num_rows
        is_there = is_row[:, None] & (dim[None, :] < head_dim)
        is_sent = is_row[:, None] & (dim[None, :] < round_up(head_dim))
        element = row[:, None] * head_dim + dim[None, :]
        outboxes = all_outboxes(counts, round, group_ptr, num_ranks)
        inboxes = all_inboxes(round, group_ptr, num_ranks)
        status = read_status(group_ptr, num_ranks)
        for i in tl.static_range(num_ranks - 1):
            first_row = ((rank + i + 1) % num_ranks).to(tl.int64) * num_rows
            o = tl.load(o_ptr + first_row * head_dim + element, mask=is_there, other=0.0)
            lse = tl.load(lse_ptr + first_row + row, mask=is_row)
            send_partials(o, lse, outboxes[i], place, is_sent & (status == 0), is_row & (status == 0), sent_dtype)
        own_lse = tl.load(lse_ptr + own_row + row, mask=is_row, other=float("-inf"))
        own_o = tl.load(o_ptr + own_row * head_dim + element, mask=is_there, other=0.0)
        messages, are_sent = (), ()
        for r in tl.static_range(num_ranks):
            messages += (pointer(inboxes[r], encode(tl.zeros([1], sent_dtype)).dtype) + place,)
            are_sent += (is_sent & (r != rank),)
        for r in tl.static_range(num_ranks):
            messages += (pointer(inboxes[r] + MESSAGE_BYTES, tl.int32) + row_place,)
            are_sent += ((is_row & (r != rank))[:, None] & (copy[None, :] < copies),)
        received = receive(messages, are_sent, status, round, group_ptr, num_ranks)
        base = own_lse
        lses, units = (), ()
        for r in tl.static_range(num_ranks):
            said = received[num_ranks + r]
            lse = tl.max(tl.where(is_lse, said, LEAST_WORD), axis=1)
            unit = tl.max(tl.where(is_lse, LEAST_WORD, said), axis=1)
            lses += (tl.where(r == rank, own_lse, decode(lse, tl.float32)),)
            units += (decode(unit, tl.float32),)
            base = tl.maximum(base, lses[r])
        base = tl.where(base == float("-inf"), 0.0, base)
        total = tl.zeros([block], tl.float32)
        weighted = tl.zeros([block, padded_dim], tl.float32)
        for r in tl.static_range(num_ranks):
            weight = tl.exp(lses[r] - base)
            o = tl.where(r == rank, own_o, decode(received[r], sent_dtype).to(tl.float32) * units[r][:, None])
            # A part without keys may be anything, NaN too.
            weighted += tl.where(weight[:, None] > 0, weight[:, None] * o, 0.0)
            total += weight
        divisor = tl.where(total > 0, total, 1.0)
        merged = weighted / divisor[:, None]
        tl.store(merged_o_ptr + element, merged.to(out_dtype), mask=is_there)
        merged_lse = tl.where(total > 0, base + tl.log(divisor), float("-inf"))
        tl.store(merged_lse_ptr + row, merged_lse, mask=is_row)
        clear(messages, are_sent, 2 * num_ranks, round + 1 < num_rounds, group_ptr, num_ranks)
    store_counts(counts, num_rounds, group_ptr, num_ranks)


@triton.jit
@no_type_check
def send_and_receive(words, place, is_sent, rank, counts, round, group_ptr, num_ranks: tl.constexpr):
    """Sends the same words to all peers: theirs, the pointers from which they come, and which of these are sent."""
    outboxes = all_outboxes(counts, round, group_ptr, num_ranks)
    inboxes = all_inboxes(round, group_ptr, num_ranks)
    status = read_status(group_ptr, num_ranks)
    messages, are_sent = (), ()
    for i in tl.static_range(num_ranks - 1):
        tl.store(pointer(outboxes[i], words.dtype) + place, words, mask=is_sent & (status == 0))
    for r in tl.static_range(num_ranks):
        messages += (pointer(inboxes[r], words.dtype) + place,)
        are_sent += (is_sent & (r != rank),)
    return receive(messages, are_sent, status, round, group_ptr, num_ranks), messages, are_sent


@triton.jit
@no_type_check
def send_partials(o, lse, outbox, place, is_sent, is_row_sent, sent_dtype: tl.constexpr):
    """Sends partial outputs [rows, H] and, behind them, what is said of each row: its log-sum-exp, and the unit of its
    output.
    """
    unit = tl.full([o.shape[0]], 1.0, tl.float32)
    if sent_dtype == tl.float16:
        largest = tl.max(tl.abs(o), axis=1)
        unit = tl.where((largest > 0) & (largest < float("inf")), largest, 1.0)
        o = o / unit[:, None]
    words = encode(o.to(sent_dtype))
    tl.store(pointer(outbox, words.dtype) + place, words, mask=is_sent)
    row_words = pointer(outbox + MESSAGE_BYTES, tl.int32) + tl.arange(0, o.shape[0]) * ROW_WORDS
    tl.store(row_words, encode(lse), mask=is_row_sent)
    tl.store(row_words + 1, encode(unit), mask=is_row_sent)


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
def encode(x):
    """The words in which elements travel, none of which is 0.

    A floating-point number is the complement of its bits: one NaN, of ones alone, becomes another. An integer takes
    twice as many bits.
    """
    bits: tl.constexpr = x.dtype.primitive_bitwidth
    if x.dtype.is_floating():
        words = ~x.to(tl.int16 if bits == 16 else tl.int32, bitcast=True)
        return tl.where(words == 0, 1, words)
    else:
        words = x.to(tl.int16 if bits <= 8 else tl.int32 if bits == 16 else tl.int64)
        return words & ((1 << bits) - 1) | (1 << bits)


@triton.jit
@no_type_check
def decode(words, dtype: tl.constexpr):
    """What `encode` was given."""
    if dtype.is_floating():
        return (~words).to(dtype, bitcast=True)
    else:
        return (words & ((1 << dtype.primitive_bitwidth) - 1)).to(dtype)


@triton.constexpr_function
def round_up(size):
    """So that a message is whole pieces of 16 bytes, which one instruction loads or stores."""
    return -(-size // PIECE_WORDS.value) * PIECE_WORDS.value


@triton.jit
@no_type_check
def receive(messages, are_sent, status, round, group_ptr, num_ranks: tl.constexpr):
    """The words of all ranks, once all that are sent are there.

    Args:
        messages: pointers to words of ranks 0, 1 and so on, perhaps followed by others of each; of both as many as
            there are threads at least.
        are_sent: which of them are sent, as masks.
        status: this device's.
        round: of the exchange.
        group_ptr: uint32 [2 n, 4].
        num_ranks: n.
    """
    wait_limit = tl.load((workspace_of(group_ptr, num_ranks) + WAIT_LIMIT).to(tl.pointer_type(tl.int32)))
    words, state = poll(messages, are_sent, status, num_ranks)
    num_polls = 1
    began = tl.cast(0, tl.int64)
    waited = tl.cast(0, tl.int64)
    while (state == MISSING) & (waited < wait_limit):
        if num_polls % POLLS_A_LOOK == 0:
            status = read_status(group_ptr, num_ranks)
            now = clock_us()
            began = tl.where(began == 0, now, began)
            waited = now - began
        words, state = poll(messages, are_sent, status, num_ranks)
        num_polls += 1
    if state == MISSING:
        report_missing(words, round, group_ptr, num_ranks)
    if state == FAILED:
        tell_peers(group_ptr, num_ranks)
    return words


@triton.jit
@no_type_check
def poll(messages, are_sent, status, num_ranks: tl.constexpr):
    """Words as they are now, 0 where one is missing, and how the wait stands, the same for all warps, who each have
    elements of what is reduced: a status that only some of them have read yet counts for all.
    """
    words = ()
    for i in tl.static_range(len(messages)):
        words += (tl.load(messages[i], mask=are_sent[i] & (status == 0), other=1, volatile=True),)
    is_missing = words[0] == 0
    for r in tl.static_range(1, num_ranks):
        is_missing = is_missing | (words[r] == 0)
    if len(messages) > num_ranks:
        is_row_missing = words[num_ranks] == 0
        for r in tl.static_range(1, num_ranks):
            is_row_missing = is_row_missing | (words[num_ranks + r] == 0)
        is_missing = is_missing | (tl.max(is_row_missing.to(tl.int32), axis=1)[:, None] > 0)
    state = tl.max(tl.where(status != 0, FAILED, tl.where(is_missing, MISSING, ARRIVED)))
    return words, state


@triton.jit
@no_type_check
def clock_us():
    """int64, the same for all warps: each reads a clock of its own, and those that end a wait earlier than others would
    be at other barriers."""
    return tl.max(tl.zeros([MOST_THREADS], tl.int64) + globaltimer() // 1000, axis=0)


@triton.jit
@no_type_check
def report_missing(words, round, group_ptr, num_ranks: tl.constexpr):
    """Sets this device's status: it has waited long enough."""
    own = workspace_of(group_ptr, num_ranks)
    missing = tl.cast(MAX_DEVICES, tl.int32)
    for i in tl.static_range(len(words)):
        device = device_of(group_ptr, i % num_ranks)
        missing = tl.minimum(missing, tl.where(tl.max((words[i] == 0).to(tl.int32)) > 0, device, MAX_DEVICES))
    number = (tl.load(counter(missing, group_ptr, num_ranks)) + round + 1) & NUMBER_MASK
    failure = (missing + 1) | (device_of(group_ptr, num_ranks) << 8) | ((number & 0x7FFF) << 16)
    tl.atomic_xchg((own + STATUS).to(tl.pointer_type(tl.int32)), failure, sem="relaxed", scope="sys")


@triton.jit
@no_type_check
def tell_peers(group_ptr, num_ranks: tl.constexpr):
    """Gives this device's status to the others of the group, who get no message from it."""
    status = read_status(group_ptr, num_ranks)
    for i in tl.static_range(1, num_ranks):
        theirs = (workspace_of(group_ptr, num_ranks + i) + STATUS).to(tl.pointer_type(tl.int32))
        tl.atomic_xchg(theirs, status, sem="relaxed", scope="sys")


@triton.jit
@no_type_check
def clear(messages, are_sent, num_messages: tl.constexpr, goes_on, group_ptr, num_ranks: tl.constexpr):
    """Makes room for the messages after the next ones; all threads have read these, or none would know that they are
    there. What is cleared must be so before this device's next message is with a peer: at a kernel's end that is so
    anyway."""
    for i in tl.static_range(num_messages):
        tl.store(messages[i], tl.zeros(messages[i].shape, messages[i].dtype.element_ty), mask=are_sent[i])
    if goes_on:
        tl.debug_barrier()
        status = (workspace_of(group_ptr, num_ranks) + STATUS).to(tl.pointer_type(tl.int32))
        tl.atomic_or(status, 0, sem="acq_rel", scope="sys")
        tl.debug_barrier()


@triton.jit
@no_type_check
def load_counts(group_ptr, num_ranks: tl.constexpr):
    """The messages exchanged so far with the ranks after this one."""
    counts = ()
    for i in tl.static_range(1, num_ranks):
        counts += (tl.load(counter(device_of(group_ptr, num_ranks + i), group_ptr, num_ranks)),)
    return counts


@triton.jit
@no_type_check
def store_counts(counts, num_rounds, group_ptr, num_ranks: tl.constexpr):
    """Counts a message a round with every peer; all threads have loaded the counts, to find the messages."""
    for i in tl.static_range(1, num_ranks):
        device = device_of(group_ptr, num_ranks + i)
        tl.store(counter(device, group_ptr, num_ranks), (counts[i - 1] + num_rounds) & NUMBER_MASK)


@triton.jit
@no_type_check
def all_outboxes(counts, round, group_ptr, num_ranks: tl.constexpr):
    """Addresses of the buffers for this round's messages to the ranks after this one."""
    own_channel = channel(device_of(group_ptr, num_ranks))
    addresses = ()
    for i in tl.static_range(1, num_ranks):
        buffer = own_channel * 2 + (counts[i - 1] + round + 1) % 2
        addresses += (workspace_of(group_ptr, num_ranks + i) + BUFFERS + buffer * BUFFER_BYTES,)
    return addresses


@triton.jit
@no_type_check
def all_inboxes(round, group_ptr, num_ranks: tl.constexpr):
    """Addresses of the buffers of this round's messages from ranks 0, 1 and so on."""
    own = workspace_of(group_ptr, num_ranks)
    addresses = ()
    for r in tl.static_range(num_ranks):
        device = device_of(group_ptr, r)
        buffer = channel(device) * 2 + (tl.load(counter(device, group_ptr, num_ranks)) + round + 1) % 2
        addresses += (own + BUFFERS + buffer * BUFFER_BYTES,)
    return addresses


@triton.jit
@no_type_check
def counter(device, group_ptr, num_ranks: tl.constexpr):
    """Where this device counts the messages of this program with another."""
    address = workspace_of(group_ptr, num_ranks) + COUNTS + channel(device) * 4
    return address.to(tl.pointer_type(tl.int32))


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
