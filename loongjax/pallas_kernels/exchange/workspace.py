"""What one GPU's workspace holds, and why two buffers a channel are enough.

Every ordered pair of GPUs and every program of a kernel's grid have a channel of their own, a queue of messages that
lies in the receiver's workspace: two buffers, of zeros where no message is. The receiver also keeps a count for each
peer and program. No word of a message is 0, so none needs a flag that says that it is there, nor a fence before such a
flag, which would cost another way to the peer and back. A program that exchanges message number s = count + 1 with a
peer

1. writes its message into buffer s mod 2 at the peer;
2. reads buffer s mod 2 of its own workspace, again and again until no word of the peer's message is 0;
3. writes zeros there.

Messages are written by plain stores and read by volatile loads, which go to the receiver's L2, where messages arrive.
No order between words is asked for, and no word is wider than what is stored and loaded whole.

Every exchange goes both ways, so one number serves both directions. Whoever has received s has proof that the peer had
read and cleared s - 1, since the peer did before it sent. So when message s + 1 is written, where s - 1 was, nobody
reads there any more, and nothing is cleared there.

The state belongs to pairs and programs, not to groups: groups may overlap and change from one exchange to the next.
Both ends of a pair must only take part in the same exchanges, of the same shapes, in the same order. Programs that are
dispatched in one order to all their devices do, as NCCL asks too, and within a program the order is that of data:
exchanges that do not depend on each other could run in any order, or at once, which is not allowed.

A program waits for nothing but the same program on its peers, and the grid is small enough that all of it is resident
at once; so exchanges end if every device comes. One that does not come ends the wait too, after as long as its limit
says: the waiting device then sets its status word and goes on with what it has. A device with a status waits no more
and writes no messages, into what somebody could still be reading, but sets the peers' statuses instead, at which those
that wait look now and then. So whoever has gone on without a message has a status from then on, and one failure does
not cost one wait after another.

After a failure the two ends of a pair may have counted differently, and hold messages for which nobody waits any more.
All such pairs are among the devices of the program that failed: it knew no others, and whatever ran before went well.
So these devices forget their statuses and what they have counted and received between each other, once all of them are
through with what they were given, and before any of them is given more. Pairs with a device outside keep their numbers,
on which both ends agree, and meanwhile that device may go on with whom it likes.
"""

from __future__ import annotations

from typing import NamedTuple

MAX_DEVICES = 16
"""Of one process."""

MAX_PROGRAMS = 128
"""Programs of a grid: all run at once on any GPU that this is for."""

MESSAGE_BYTES = 16 * 1024
"""The most that one message carries, but for `EXTRA_BYTES`."""

MAX_ROWS = 64
"""Of partial outputs in a message, behind which is what is said of them."""

ROW_BYTES = 32
"""A memory sector each: the row's log-sum-exp and unit."""

EXTRA_BYTES = ROW_BYTES * MAX_ROWS

BUFFER_BYTES = MESSAGE_BYTES + EXTRA_BYTES

NUMBER_MASK = 2**30 - 1
"""Message numbers begin again at 0 after it."""

DEFAULT_WAIT_LIMIT_S = 30.0
"""A peer may be late by a whole prefill."""

POLLS_A_LOOK = 256
"""Polls of a message before a look at the clock and the status, so that there is none while peers are in time."""

STATUS = 0
"""int32: 0, or what `Failure.from_status` reads."""
WAIT_LIMIT = 4
"""int32: microseconds that one wait may take, about."""
COUNTS = 128
"""int32 [device, program]: messages exchanged so far; only its own device touches it."""
BUFFERS = COUNTS + MAX_DEVICES * MAX_PROGRAMS * 4
"""[device, program, 2, BUFFER_BYTES]"""


def workspace_bytes(num_devices: int) -> int:
    """Of each device."""
    return BUFFERS + num_devices * MAX_PROGRAMS * 2 * BUFFER_BYTES


class Failure(NamedTuple):
    """A wait that ended before the peer came."""

    waiting: int
    """The device that gave up, by its place in the workspaces."""
    missing: int
    """The device that did not come."""
    number: int
    """The message's number, its lowest 15 bits."""

    @classmethod
    def from_status(cls, status: int) -> Failure:
        """The meaning of a status word that is not 0."""
        return cls(waiting=(status >> 8) & 0xFF, missing=(status & 0xFF) - 1, number=status >> 16)
