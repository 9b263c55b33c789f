"""What queries and keys must have in common, for callers whose annotations nobody checks."""

import pytest

from loongjax.pallas_kernels.head_groups import check_heads


def test_a_head_dim_that_differs_from_that_of_the_keys_is_refused():
    with pytest.raises(ValueError, match="op: queries have head_dim 32, keys 16"):
        check_heads("op", (5, 4, 32), (7, 2, 16))


def test_keys_without_heads_are_refused():
    with pytest.raises(ValueError, match="got 4 and 0"):
        check_heads("op", (5, 4, 16), (7, 0, 16))


@pytest.mark.parametrize("num_q_heads", [2, 4, 6])
def test_any_multiple_of_the_kv_heads_groups(num_q_heads):
    check_heads("op", (5, num_q_heads, 16), (7, 2, 16))
