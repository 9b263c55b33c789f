"""The groups of points against the paper's, and on fewer devices."""

import dataclasses
from typing import get_args

import pytest

from loongjax.costmodel.work import Strategy
from loongjax.errors import ConfigError
from loongjax_profiling.iteration.case import Case
from loongjax_profiling.iteration.grids import GridName, build_grid, whole_machine, widest

NAMES: tuple[GridName, ...] = get_args(GridName)


def strategies_of(cases) -> set[tuple[int, int]]:
    return {(case.strategy.sp, case.strategy.tp) for case in cases}


@pytest.mark.parametrize("num_devices", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("name", NAMES)
def test_no_point_is_there_twice_or_needs_more_devices_than_there_are(name, num_devices):
    cases = build_grid(name, num_devices=num_devices).cases
    assert len(set(cases)) == len(cases) > 0
    assert all(sp * tp <= num_devices for sp, tp in strategies_of(cases))


def test_figure_2_has_the_papers_32_points_in_prefill_and_decode():
    cases = build_grid("figure2", num_devices=8).cases
    assert len(cases) == 2 * 32
    assert strategies_of(cases) == {(1, 1), (1, 2), (1, 4), (1, 8)}


def test_figure_3_has_the_papers_18_points_and_masters():
    cases = build_grid("figure3", num_devices=8).cases
    decodes = [case for case in cases if case.kind == "decode"]
    assert len(cases) == 2 * len(decodes) == 36
    assert strategies_of(cases) == {(1, 8), (2, 4), (4, 2)}
    masters = {(c.strategy.sp, c.batch_size, c.input_len): c.num_masters for c in decodes}
    assert [masters[sp, 512, 1000] for sp in (1, 2, 4)] == [1, 2, 4]
    assert [masters[sp, 128, 5000] for sp in (1, 2, 4)] == [1, 1, 2]
    assert [masters[sp, 64, 10_000] for sp in (1, 2, 4)] == [1, 1, 2]
    assert {number for (_, size, _), number in masters.items() if size < 64} == {1}


def test_figure_13_scales_down_and_up_at_the_papers_7_points():
    cases = build_grid("figure13", num_devices=8).cases
    assert strategies_of(cases) == {(4, 2)}
    assert sum(case.scales_down for case in cases) == 7
    assert sum(case.kind == "prefill" and not case.scales_down for case in cases) == 7
    # One request has one master, two have two at most: 5 x 3 + 2 + 1.
    assert sum(case.kind == "decode" for case in cases) == 18
    up = set(build_grid("scale-up", num_devices=8).cases)
    down = set(build_grid("scale-down", num_devices=8).cases)
    assert up | down | {case for case in cases if case.kind == "prefill"} == set(cases)


def test_the_analytical_model_has_the_papers_strategies_and_works():
    cases = build_grid("analytical-model", num_devices=8).cases
    assert strategies_of(cases) == {
        (1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (6, 1), (7, 1), (8, 1),
        (1, 2), (2, 2), (3, 2), (4, 2), (1, 4), (2, 4), (1, 8),
    }  # fmt: skip
    prefills = [case for case in cases if case.kind == "prefill"]
    # 16 batch sizes and 15 lengths, less what the memory at hand cannot hold.
    assert len(prefills) == 15 * 16 * 15
    assert {case.strategy.tp for case in cases if case.kind == "migration"} == {1, 2, 4}


def test_several_nodes_add_more_instances_of_two_devices():
    few = strategies_of(build_grid("analytical-model", num_devices=16).cases)
    many = strategies_of(build_grid("multi-node", num_devices=16).cases)
    assert many - few == {(5, 2), (6, 2), (7, 2), (8, 2)}


def test_the_first_pass_of_the_analytical_model_covers_all_scales_strategies_and_kinds():
    grid = build_grid("analytical-model", num_devices=4)
    first = grid.passes[0]
    assert strategies_of(first) == strategies_of(grid.cases)
    assert len(first) < len(grid.cases) / 5
    for strategy in {case.strategy for case in first}:
        prefills = [case for case in first if case.strategy == strategy and case.kind == "prefill"]
        assert {case.input_len for case in prefills} == {10, 100, 1000, 10_000, 100_000}
    assert any(case.num_masters == 4 for case in first)
    assert any(case.kind == "migration" for case in first)


def test_decodes_of_the_analytical_model_have_one_master_or_all():
    cases = build_grid("analytical-model", num_devices=4).cases
    masters = {
        case.num_masters
        for case in cases
        if case.kind == "decode" and case.strategy == Strategy(4) and case.batch_size >= 4
    }
    assert masters == {1, 4}


def test_chunks_come_alone_and_beside_decodes_on_one_instance():
    grid = build_grid("chunks", num_devices=4)
    assert {case.kind for case in grid.cases} == {"extend"}
    assert strategies_of(grid.cases) == {(1, 1), (1, 2), (1, 4)}
    for cases in grid.passes:
        for tp in (1, 2, 4):
            mine = [case for case in cases if case.strategy.tp == tp]
            # What a fit has to tell apart: new tokens, tokens before them, and keys of decodes.
            assert len({case.input_len for case in mine}) >= 3
            assert len({case.past_len for case in mine}) >= 3
            assert {case.num_decodes > 0 for case in mine} == {False, True}


def test_sp_vs_tp_has_every_split_of_every_power_of_two():
    cases = build_grid("sp-vs-tp", num_devices=8).cases
    assert strategies_of(cases) == {
        (1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (1, 4), (8, 1), (4, 2), (2, 4), (1, 8)
    }  # fmt: skip
    assert {case.batch_size for case in cases} == {1}


@pytest.mark.parametrize(("num_devices", "expected"), [(1, (1, 1)), (2, (2, 1)), (4, (4, 1)), (6, (4, 1)), (8, (4, 2))])
def test_the_widest_strategy_is_the_papers_on_8_devices_and_has_as_many_instances_as_it_can_on_fewer(
    num_devices, expected
):
    assert widest(num_devices) == Strategy(*expected)


def test_a_machine_is_cut_into_at_most_four_instances():
    assert whole_machine(8) == (Strategy(1, 8), Strategy(2, 4), Strategy(4, 2))
    assert whole_machine(4) == (Strategy(1, 4), Strategy(2, 2), Strategy(4, 1))
    assert whole_machine(3) == (Strategy(1, 2), Strategy(2, 1))
    assert whole_machine(1) == (Strategy(1),)


def test_shrunk_points_that_become_equal_are_one():
    cases = build_grid("figure2", num_devices=1, shrink=100).cases
    lens = {(case.batch_size, case.input_len) for case in cases}
    assert lens == {(16, 1), (16, 5), (1, 1), (1, 10), (1, 100), (1, 1000)}
    assert len(cases) == 2 * len(lens)


def test_a_shrunk_chunk_is_no_decode():
    cases = build_grid("chunks", num_devices=1, shrink=1000).cases
    assert {case.input_len for case in cases} == {2, 3, 5, 9}
    assert {case.past_len for case in cases} == {1, 5, 10, 50, 100, 200}


def test_a_point_says_what_it_is():
    case = Case(kind="decode", strategy=Strategy(4, 2), batch_size=64, input_len=1000, num_masters=2)
    assert str(case) == "decode of 64 x 1000 on sp4 tp2, 2 masters"
    down = Case(kind="prefill", strategy=Strategy(2), input_len=7, scales_down=True)
    assert str(down) == "prefill of 1 x 7 on sp2 tp1, scaled down"
    extend = Case(kind="extend", strategy=Strategy(1, 2), input_len=500, past_len=9000, num_decodes=12)
    assert str(extend) == "extend of 1 x 500 on sp1 tp2, behind 9000 each, beside 12 decodes"
    assert str(Case(kind="migration", strategy=Strategy(2), input_len=7)) == "migration of 7 tokens, tp1"


@pytest.mark.parametrize(
    "change",
    [
        {"num_masters": 0},
        {"num_masters": 5},
        {"batch_size": 1, "num_masters": 2},
        {"scales_down": True},
        {"input_len": 0},
        {"kind": "prefill"},
        {"past_len": 1},
        {"num_decodes": 1},
    ],
)
def test_a_point_that_cannot_be_is_a_mistake(change):
    case = Case(kind="decode", strategy=Strategy(4), batch_size=8, input_len=10, num_masters=4)
    with pytest.raises(ConfigError, match="no such iteration"):
        dataclasses.replace(case, **change)


@pytest.mark.parametrize(
    "change", [{"strategy": Strategy(2)}, {"input_len": 1}, {"past_len": 0}, {"num_decodes": -1}, {"num_masters": 1}]
)
def test_an_extend_that_cannot_be_is_a_mistake(change):
    case = Case(kind="extend", strategy=Strategy(1), input_len=10, past_len=4)
    with pytest.raises(ConfigError, match="no such iteration"):
        dataclasses.replace(case, **change)
