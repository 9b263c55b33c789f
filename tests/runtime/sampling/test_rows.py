"""Host values become rows, and the cheapest variant that serves them."""

import itertools

import numpy as np
import pytest

from loongjax.runtime.sampling import TIERS, build_rows
from loongjax.runtime.sampling.rows import FOREVER, UNLIMITED, edit_capacity
from loongjax.runtime.sampling.variant import choose_variant
from tests.runtime.sampling.oracle import make_input


@pytest.mark.parametrize(
    ("params", "name"),
    [
        ({"temperature": 0.0}, "greedy"),
        ({"temperature": 0.0, "top_p": 0.5, "top_k": 3}, "greedy"),
        ({"temperature": 0.7}, "sampled"),
        ({"temperature": 0.7, "top_k": -1}, "sampled"),
        ({"top_k": 3}, "filtered"),
        ({"top_p": 0.9}, "filtered"),
        ({"min_p": 0.1}, "filtered"),
        ({"temperature": 0.0, "logprobs": 0}, "scored"),
        ({"temperature": 0.0, "prompt_logprobs": 5}, "greedy"),
        ({"logit_bias": {3: 1.0}}, "scored"),
        ({"min_tokens": 2, "stop_ids": (4,)}, "scored"),
        ({"temperature": 0.0, "min_tokens": 2}, "greedy"),
        ({"temperature": 0.0, "min_tokens": 2, "stop_ids": (4,), "output": (7, 7)}, "greedy"),
        ({"presence_penalty": 0.1}, "full"),
        ({"temperature": 0.0, "frequency_penalty": -0.1}, "full"),
        ({"repetition_penalty": 1.1}, "full"),
    ],
)
def test_a_request_gets_the_cheapest_variant_that_serves_it(params, name):
    assert choose_variant([make_input(**params)]).name == name


def test_each_tier_covers_the_one_before_and_not_the_one_after():
    for lower, higher in itertools.pairwise(TIERS):
        assert higher.covers(lower)
        assert not lower.covers(higher)


def test_a_batch_gets_a_variant_that_serves_all_of_it():
    inputs = [make_input(temperature=0.0), make_input(top_p=0.5), make_input()]
    variant, rows = build_rows([inputs[:1], inputs[1:]], 2)
    assert variant.name == "filtered"
    assert rows.edits is None
    assert rows.penalties is None


def test_rows_carry_each_request_at_its_rank_and_place():
    inputs = [[], [make_input(temperature=0.5, seed=-2, top_k=4), make_input(top_p=0.25, min_p=0.125, seed=2**33 + 5)]]
    _, rows = build_rows(inputs, 4)
    assert rows.noise is not None
    assert rows.filters is not None
    np.testing.assert_array_equal(rows.noise.temperature, [[0, 0, 0, 0], [0.5, 1, 0, 0]])
    np.testing.assert_array_equal(rows.noise.seed[1, :2], [[0xFFFFFFFF, 0xFFFFFFFE], [2, 5]])
    np.testing.assert_array_equal(rows.filters.top_k[1], [4, UNLIMITED, UNLIMITED, UNLIMITED])
    np.testing.assert_array_equal(rows.filters.top_p[1], [1, 0.25, 1, 1])
    np.testing.assert_array_equal(rows.filters.min_p[1], [0, 0.125, 0, 0])


def test_a_named_variant_gives_rows_of_its_structure_whatever_the_requests():
    for variant in TIERS:
        chosen, rows = build_rows([[], []], 2, variant)
        assert chosen is variant
        assert (rows.noise is not None) == variant.has_noise
        assert (rows.filters is not None) == variant.has_filters
        assert (rows.edits is not None) == variant.has_edits
        assert (rows.penalties is not None) == variant.has_penalties


def test_edits_list_biases_for_ever_and_stop_tokens_until_min_tokens():
    item = make_input(prompt=(9,) * 10, logit_bias={5: 2.0}, min_tokens=3, stop_ids=(8, 6), output=(1,))
    _, rows = build_rows([[make_input(), item]], 2)
    assert rows.edits is not None
    edits = set(zip(*(column[0].tolist() for column in rows.edits), strict=True))
    assert edits == {(1, 5, 2.0, FOREVER), (1, 6, -np.inf, 13), (1, 8, -np.inf, 13), (2, 0, 0.0, 0)}


def test_token_ids_beyond_int32_edit_nothing():
    _, rows = build_rows([[make_input(logit_bias={2**40: 1.0, 3: 1.0})]], 1)
    assert rows.edits is not None
    assert sorted(set(rows.edits.token_id[0].tolist())) == [0, 3]


def test_edit_capacities_are_few_and_hold_any_number():
    assert edit_capacity(0, 4) == edit_capacity(64, 4) == 64
    assert edit_capacity(65, 4) == edit_capacity(2048, 4) == 2048
    assert edit_capacity(2049, 4) == 8192
    assert edit_capacity(1_000_000, 4) >= 1_000_000


def test_extreme_values_become_ordinary_floats():
    limits = np.finfo(np.float32)
    inputs = [make_input(temperature=1e-300), make_input(temperature=1e300), make_input(temperature=1e-40)]
    inputs += [make_input(repetition_penalty=1e-300), make_input(repetition_penalty=1e300, top_k=2**40)]
    _, rows = build_rows([inputs], 5)
    assert rows.noise is not None
    assert rows.penalties is not None
    assert rows.filters is not None
    np.testing.assert_array_equal(rows.noise.temperature[0, :3], [0.0, limits.max, 0.0])
    assert ((rows.penalties.repetition > 0) & np.isfinite(rows.penalties.repetition)).all()
    assert rows.filters.top_k[0, 4] == UNLIMITED
