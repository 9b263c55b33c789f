"""Which of a row's columns a thread shows, computed on plain integers instead of registers."""

import operator
import types
from unittest import mock

from loongjax.pallas_kernels.prefill_attention import mosaic_gpu_registers as registers

WORD = 2**32

ON_INTEGERS = types.SimpleNamespace(
    addi=operator.add,
    subi=operator.sub,
    muli=operator.mul,
    andi=operator.and_,
    shli=lambda value, count: (value << count) % WORD,
    shrsi=operator.rshift,
    maxsi=max,
    minsi=min,
    cmpi=lambda _, left, right: left >= right,
    select=lambda condition, yes, no: yes if condition else no,
    CmpIPredicate=types.SimpleNamespace(sge=None),
)


def bits_below(column: int) -> int:
    with mock.patch.multiple(registers, arith=ON_INTEGERS, _i32=int):
        return registers._bits_below(column) % WORD


def test_a_thread_has_a_bit_for_each_of_its_columns_that_is_below():
    # A thread has the first two of every eight columns of a word, counted from its own first one.
    columns = [8 * group + place for group in range(16) for place in range(2)]
    for bound in range(-300, 301):
        assert bits_below(bound) == sum(1 << bit for bit, column in enumerate(columns) if column < bound), bound


def test_bounds_may_be_far_away():
    assert bits_below(-(2**31)) == 0
    assert bits_below(2**31 - 1) == WORD - 1
