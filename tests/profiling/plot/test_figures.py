"""The figures: from complete databases, from partial ones, and from those that lack their points."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from loongjax.costmodel.work import Strategy
from loongjax.errors import ConfigError
from loongjax_profiling.iteration.case import Case
from loongjax_profiling.iteration.grids import GridName, build_grid
from loongjax_profiling.plot import accuracy, scaling, sequence_parallelism, tensor_parallelism
from loongjax_profiling.plot.command import PlotCommand, main
from loongjax_profiling.plot.times import Times
from tests.costmodel.shapes import measurements
from tests.profiling.synthetic import H200, make_database, model_cases, timed


def times_of(name: GridName, num_devices: int = 8, leaves_out=lambda case: False) -> Times:
    cases = build_grid(name, num_devices=num_devices).cases
    return Times(
        seconds={case: timed(case).seconds for case in cases if not leaves_out(case)},
        system="a system",
        num_devices=num_devices,
    )


def panels(figure):
    return figure.get_axes()


def series(axes) -> dict[str, tuple[list[float], list[float]]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}


def last(values) -> float:
    """Of the points of a line that ascends."""
    return max(np.asarray(values, float).tolist())


def test_figure_2_has_four_panels_of_four_lengths_relative_to_the_longest_time():
    figure = tensor_parallelism.draw(times_of("figure2"))
    assert len(panels(figure)) == 4
    lens = [["10", "50", "100", "500"], ["10", "50", "100", "500"], ["100", "1000", "10000", "100000"]]
    for axes, expected in zip(panels(figure), lens, strict=False):
        drawn = series(axes)
        assert drawn.keys() == {f"{length} tokens" for length in expected} | {"1 / tp"}
        for label, (xs, ys) in drawn.items():
            assert xs == [1, 2, 4, 8]
            assert max(ys) == 1.0
            if label == "1 / tp":
                assert ys == [1.0, 0.5, 0.25, 0.125]


def test_figure_2_draws_the_ratios_of_the_times():
    seconds = {case: case.input_len / case.strategy.tp**0.5 for case in build_grid("figure2", num_devices=8).cases}
    figure = tensor_parallelism.draw(Times(seconds=seconds, system="a system", num_devices=8))
    for axes in panels(figure):
        for label, (_, ys) in series(axes).items():
            if label != "1 / tp":
                np.testing.assert_allclose(ys, [1.0, 2**-0.5, 0.5, 8**-0.5])


def test_figure_3_has_a_bar_for_each_strategy_and_work_relative_to_the_fewest_instances():
    figure = sequence_parallelism.draw(times_of("figure3"))
    assert len(panels(figure)) == 2
    for axes in panels(figure):
        assert [bars.get_label() for bars in axes.containers] == ["sp1 tp8", "sp2 tp4", "sp4 tp2"]
        assert all(len(bars) == 6 for bars in axes.containers)
        assert [bar.get_height() for bar in axes.containers[0]] == [1.0] * 6
    expected = [
        timed(Case(kind="prefill", strategy=Strategy(4, 2), batch_size=b, input_len=n)).seconds
        / timed(Case(kind="prefill", strategy=Strategy(1, 8), batch_size=b, input_len=n)).seconds
        for b, n in [(512, 1000), (128, 5000), (64, 10_000), (16, 50_000), (4, 100_000), (1, 500_000)]
    ]
    np.testing.assert_allclose([bar.get_height() for bar in panels(figure)[0].containers[2]], expected)


def test_figure_2_leaves_out_what_was_measured_with_one_tp_alone():
    figure = tensor_parallelism.draw(
        times_of(
            "figure2", leaves_out=lambda case: case.strategy.tp == 1 or (case.strategy.tp > 2) > (case.input_len < 500)
        )
    )
    first = series(panels(figure)[0])
    assert first.keys() == {"10 tokens", "50 tokens", "100 tokens", "1 / tp"}
    assert first["1 / tp"] == ([2, 4, 8], [1.0, 0.5, 0.25])


@pytest.mark.parametrize("figure", [tensor_parallelism, sequence_parallelism])
def test_one_strategy_alone_is_no_comparison(figure):
    name: GridName = "figure2" if figure is tensor_parallelism else "figure3"
    with pytest.raises(ConfigError, match="lacks the points"):
        figure.draw(times_of(name, leaves_out=lambda case: case.strategy != Strategy(1, 8)))


def test_figure_3_leaves_out_works_that_only_one_strategy_could_run():
    def leaves_out(case):
        return case.strategy.sp > 1 and case.input_len >= 100_000

    left, right = panels(sequence_parallelism.draw(times_of("figure3", leaves_out=leaves_out)))
    for axes in (left, right):
        assert [label.get_text() for label in axes.get_xticklabels()] == [
            "512 x 1,000",
            "128 x 5,000",
            "64 x 10,000",
            "16 x 50,000",
        ]


def test_figure_3_leaves_out_works_that_nobody_could_run():
    figure = sequence_parallelism.draw(times_of("figure3", leaves_out=lambda case: case.input_len == 500_000))
    assert all(len(bars) == 5 for axes in panels(figure) for bars in axes.containers)


def test_figure_13_compares_scaled_with_unscaled_and_masters_with_one():
    left, right = panels(scaling.draw(times_of("figure13")))
    xs, ys = series(left)["scaled down"]
    assert xs == list(range(7))
    np.testing.assert_allclose(ys, 1.01)
    drawn = series(right)
    assert drawn["2 masters"][0] == list(range(6))
    assert drawn["4 masters"][0] == list(range(5))
    base = Case(kind="decode", strategy=Strategy(4, 2), batch_size=1024, input_len=10, num_masters=1)
    four = Case(kind="decode", strategy=Strategy(4, 2), batch_size=1024, input_len=10, num_masters=4)
    assert drawn["4 masters"][1][0] == pytest.approx(timed(four).seconds / timed(base).seconds)


def test_figure_13_shows_only_works_that_were_measured():
    left, right = panels(scaling.draw(times_of("figure13", leaves_out=lambda case: case.batch_size > 64)))
    for axes in (left, right):
        labels = [label.get_text() for label in axes.get_xticklabels()]
        assert labels == ["64 x 1,000", "16 x 10,000", "4 x 50,000", "2 x 100,000", "1 x 200,000"]


def test_figure_14_draws_predictions_through_what_was_measured():
    whole = measurements((Strategy(1), Strategy(2), Strategy(4)))
    figure = accuracy.draw(whole, "a system")
    [axes] = panels(figure)
    assert axes.get_title() == "sp4 tp1"
    markers = [line for line in axes.get_lines() if line.get_marker() == "x"]
    assert [line.get_label() for line in markers] == ["batch size 1", "batch size 4"]
    lines = [line for line in axes.get_lines() if line.get_marker() != "x"]
    for marker, line in zip(markers, lines, strict=True):
        assert line.get_color() == marker.get_color()
        assert last(line.get_xdata()) == last(marker.get_xdata())
        assert last(line.get_ydata()) == pytest.approx(last(marker.get_ydata()), rel=1e-6)


@pytest.mark.parametrize("figure", ["2", "3", "13"])
def test_a_database_without_a_figures_points_says_what_measures_them(tmp_path, figure):
    path = make_database(tmp_path / "points.sqlite", [Case(kind="prefill", strategy=Strategy(1), input_len=77)])
    with pytest.raises(ConfigError, match=f"profile iteration --grid figure{figure} --shrink 1 --db FILE"):
        main([figure, "--db", str(path), "--out", str(tmp_path / "figure.png")])
    assert not (tmp_path / "figure.png").exists()


def test_figure_14_without_enough_points_says_what_measures_them(tmp_path):
    path = make_database(tmp_path / "points.sqlite", [Case(kind="prefill", strategy=Strategy(1), input_len=77)])
    with pytest.raises(ConfigError, match="--grid analytical-model"):
        main(["14", "--db", str(path), "--out", str(tmp_path / "figure.png")])


@pytest.mark.parametrize(("figure", "grid"), [("2", "figure2"), ("3", "figure3"), ("13", "figure13"), ("14", None)])
def test_each_figure_is_a_picture(tmp_path: Path, figure, grid: GridName | None):
    cases = build_grid(grid, num_devices=4, shrink=10).cases if grid else model_cases((Strategy(1), Strategy(2)))
    path = make_database(tmp_path / "points.sqlite", cases)
    out = tmp_path / "figures" / "figure.png"
    assert main([figure, "--db", str(path), "--out", str(out), "--shrink", "10"]) == 0
    assert out.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = imread(out)
    assert min(pixels.shape[:2]) > 400
    assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 20


@pytest.mark.parametrize(("device", "shrink"), [("cpu", 256), ("NVIDIA H200", 1)])
def test_lengths_are_divided_as_the_profiler_divides_them_there(tmp_path, device, shrink):
    cases = build_grid("figure13", num_devices=4, shrink=shrink).cases
    path = make_database(tmp_path / "points.sqlite", cases, system=dataclasses.replace(H200, device=device))
    assert main(["13", "--db", str(path), "--out", str(tmp_path / "figure.png")]) == 0


def test_a_picture_that_cannot_be_written_is_said_first(tmp_path):
    with pytest.raises(ConfigError, match=r"--out .* is a folder"):
        main(["13", "--db", str(tmp_path / "nothing"), "--out", str(tmp_path)])


def test_the_database_is_not_drawn_over(tmp_path):
    path = make_database(tmp_path / "points.sqlite", model_cases((Strategy(1),)))
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"--out .* is the file of --db"):
        main(["14", "--db", str(path), "--out", str(path)])
    assert path.read_bytes() == before


def test_lengths_are_divided_by_at_least_one(tmp_path):
    with pytest.raises(ConfigError, match="--shrink"):
        PlotCommand(figure="2", db=tmp_path / "points.sqlite", out=tmp_path / "figure.png", shrink=0)
