"""Workloads against what is published of them, and against arithmetic."""

import json
import pathlib

import numpy as np
import pytest

from loongjax.errors import ConfigError
from loongjax_profiling.simulate.assembly import make_workload
from loongjax_profiling.simulate.workload.arrivals import arrival_times
from loongjax_profiling.simulate.workload.config import WorkloadConfig
from loongjax_profiling.simulate.workload.lengths import LengthDistribution, Quantiles
from loongjax_profiling.simulate.workload.leval import LEvalLengths
from loongjax_profiling.simulate.workload.lveval import LvEvalLengths
from loongjax_profiling.simulate.workload.mixed import MixedLengths
from loongjax_profiling.simulate.workload.mooncake import MooncakeLengths, read_mooncake
from loongjax_profiling.simulate.workload.request import WorkloadRequest
from loongjax_profiling.simulate.workload.sharegpt import ShareGptLengths
from loongjax_profiling.simulate.workload.synthetic import synthesize
from loongjax_profiling.simulate.workload.zipf import ZipfLengths

DISTRIBUTIONS = (
    ShareGptLengths(),
    LEvalLengths(),
    LvEvalLengths(),
    MixedLengths(),
    ZipfLengths(1.2),
    MooncakeLengths(),
)
COUNT = 40_000


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=lambda d: type(d).__name__)
def test_every_distribution_gives_whole_lengths_of_at_least_one(distribution: LengthDistribution):
    lengths = distribution.sample(1000, generator())
    assert len(lengths) == 1000
    for part in (lengths.prompt, lengths.output):
        assert part.dtype == np.int64
        assert part.min() >= 1


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=lambda d: type(d).__name__)
def test_a_seed_gives_the_same_lengths_again(distribution: LengthDistribution):
    first, second = distribution.sample(100, generator(3)), distribution.sample(100, generator(3))
    assert (first.prompt == second.prompt).all()
    assert (first.output == second.output).all()


def test_sharegpt_has_the_published_percentiles_and_nearly_the_published_means():
    lengths = ShareGptLengths().sample(10 * COUNT, generator())
    assert np.percentile(lengths.prompt, (10, 50, 90, 99)) == pytest.approx((143, 822, 1826, 2202), rel=0.05)
    assert np.percentile(lengths.output, (50, 90)) == pytest.approx((137, 602), rel=0.05)
    assert lengths.prompt.max() <= 2238
    assert lengths.output.max() <= 993
    assert lengths.prompt.mean() == pytest.approx(897, rel=0.06)
    assert lengths.output.mean() == pytest.approx(233, rel=0.06)


def test_leval_spans_the_published_range_and_mostly_asks_for_short_answers():
    lengths = LEvalLengths().sample(COUNT, generator())
    assert lengths.prompt.min() == 2700
    assert lengths.prompt.max() <= 210_500
    # The mean of the published words by task, weighted by their instructions, times 1.5.
    assert lengths.prompt.mean() == pytest.approx(14_100, rel=0.06)
    assert np.mean(lengths.output <= 3) == pytest.approx(893 / 2056, abs=0.02)


def test_lveval_spans_the_published_range_evenly_over_five_doublings():
    lengths = LvEvalLengths().sample(COUNT, generator())
    assert 15_100 <= lengths.prompt.min() < 15_300
    assert 490_000 < lengths.prompt.max() <= 497_300
    levels = np.histogram(lengths.prompt, [0, 16_000 * 1.94, 32_000 * 1.94, 64_000 * 1.94, 1e6])[0]
    assert levels.min() > 0.15 * COUNT


def test_mixed_has_a_third_of_each_dataset_and_nothing_tiny():
    lengths = MixedLengths().sample(3001, generator())
    assert len(lengths) == 3001
    assert lengths.prompt.min() >= 16
    assert lengths.output.min() >= 4
    assert np.mean(lengths.prompt < 2_500) == pytest.approx(1 / 3, abs=0.01)


@pytest.mark.parametrize("alpha", [1.0, 1.2, 1.4])
def test_zipf_gives_each_length_the_probability_of_the_law(alpha: float):
    prompt = ZipfLengths(alpha).sample(COUNT, generator()).prompt
    lengths = np.arange(10, 200_000)
    weights = lengths.astype(np.float64) ** -alpha
    probabilities = weights / weights.sum()
    assert prompt.min() == 10
    assert prompt.max() <= 199_999
    for low, high in ((10, 11), (10, 100), (100, 10_000), (10_000, 200_000)):
        expected = probabilities[(lengths >= low) & (lengths < high)].sum()
        error = 4 * np.sqrt(expected * (1 - expected) / COUNT)
        assert np.mean((prompt >= low) & (prompt < high)) == pytest.approx(expected, abs=error)


@pytest.mark.parametrize("alpha", [-1.0, 1e9, float("nan"), float("inf")])
def test_zipfs_exponent_must_leave_probabilities(alpha: float):
    with pytest.raises(ConfigError, match="exponent"):
        ZipfLengths(alpha)


def test_the_largest_exponent_gives_the_shortest_prompts():
    assert set(ZipfLengths(100.0).sample(50, generator()).prompt) == {10}


def test_quantiles_pass_through_their_points():
    drawn = Quantiles(((0.0, 10), (0.25, 100), (1.0, 1000))).sample(COUNT, generator())
    assert np.percentile(drawn, 25) == pytest.approx(100, rel=0.03)
    # Uniform in the logarithm: half way between, the geometric mean.
    assert np.percentile(drawn, 62.5) == pytest.approx(np.sqrt(100 * 1000), rel=0.03)


@pytest.mark.parametrize("cv", [0.0, 0.5, 1.0, 3.0])
def test_arrivals_have_the_rate_and_the_burstiness_that_were_asked_for(cv: float):
    times = arrival_times(5.0, COUNT, generator(), cv=cv)
    gaps = np.diff(times)
    assert (gaps >= 0).all()
    assert times[-1] == pytest.approx(COUNT / 5.0)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, abs=0.05 + 0.03 * cv)


@pytest.mark.parametrize("cv", [1e-200, 1e-320, 1e-155, 1e-9])
def test_gaps_that_hardly_vary_are_equal(cv: float):
    assert arrival_times(2.0, 50, generator(), cv=cv) == pytest.approx(np.arange(1, 51) / 2.0)


def test_another_rate_is_the_same_pattern_faster():
    slow, fast = arrival_times(1.0, 50, generator(1)), arrival_times(4.0, 50, generator(1))
    assert slow == pytest.approx(4.0 * fast)


@pytest.mark.parametrize(
    ("rate", "count", "cv"),
    [
        (0.0, 1, 1.0),
        (1.0, 0, 1.0),
        (1.0, 1, -1.0),
        (float("inf"), 1, 1.0),
        (1.0, 5, 1e9),
        (1.0, 5, 1e200),
        (1e-300, 1, 1.0),
    ],
)
def test_impossible_arrivals_are_refused(rate: float, count: int, cv: float):
    with pytest.raises(ConfigError):
        arrival_times(rate, count, generator(), cv=cv)


def test_the_requests_of_a_seed_do_not_depend_on_rate_or_burstiness():
    calm = synthesize(ShareGptLengths(), rate=1.0, num_requests=20, seed=4)
    wild = synthesize(ShareGptLengths(), rate=9.0, num_requests=20, cv=4.0, seed=4)
    assert [(r.prompt_len, r.output_len) for r in calm] == [(r.prompt_len, r.output_len) for r in wild]
    other = synthesize(ShareGptLengths(), rate=1.0, num_requests=20, seed=5)
    assert [r.prompt_len for r in calm] != [r.prompt_len for r in other]


class TestMooncakeFiles:
    def write(self, path: pathlib.Path, *rows: object) -> pathlib.Path:
        file = path / "trace.jsonl"
        file.write_text("\n".join(json.dumps(row) for row in rows))
        return file

    def test_times_are_milliseconds_and_blocks_are_ignored(self, tmp_path: pathlib.Path):
        file = self.write(
            tmp_path,
            {"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1]},
            {"timestamp": 3000, "input_length": 7322, "output_length": 0, "hash_ids": []},
        )
        assert read_mooncake(file) == [
            WorkloadRequest(arrival_s=0.0, prompt_len=6758, output_len=500),
            WorkloadRequest(arrival_s=3.0, prompt_len=7322, output_len=1),
        ]

    def times(self, path: pathlib.Path, *timestamps: float, speed: float = 1.0) -> list[float]:
        """When requests of a trace with these timestamps arrive."""
        file = self.write(path, *[{"timestamp": each, "input_length": 5, "output_length": 5} for each in timestamps])
        return [request.arrival_s for request in read_mooncake(file, speed=speed)]

    def test_it_can_be_played_faster(self, tmp_path: pathlib.Path):
        assert self.times(tmp_path, 0, 1000, 2000, speed=2.0) == [0.0, 0.5, 1.0]

    def test_times_of_a_calendar_are_counted_from_the_earliest_and_others_from_the_traces_begin(
        self, tmp_path: pathlib.Path
    ):
        assert self.times(tmp_path, 3_600_000, 3_601_000) == [3600.0, 3601.0], "the second hour of a trace"
        assert self.times(tmp_path, 1_700_000_000_250, 1_700_000_000_000) == [0.0, 0.25]
        # As floats these two are equal.
        assert self.times(tmp_path, 1_700_000_000_000_000_000, 1_700_000_000_000_000_100) == [0.0, 0.1]

    @pytest.mark.parametrize("begin", [0, 1_700_000_000_000_000_000])
    def test_a_trace_of_centuries_is_refused_by_line(self, tmp_path: pathlib.Path, begin: int):
        """Half a day in nanoseconds."""
        with pytest.raises(ConfigError, match=r"line 3: .* more than 1e\+10 s into the trace .* in milliseconds"):
            self.times(tmp_path, begin, begin + 9_000_000_000_000, begin + 43_200_000_000_000)
        with pytest.raises(ConfigError, match=r"line 2: .* at a speed of 1e-12"):
            self.times(tmp_path, begin, begin + 1000, speed=1e-12)

    def test_the_first_requests_are_the_first_to_arrive_and_what_is_left_out_is_told(self, tmp_path: pathlib.Path):
        row = {"input_length": 5, "output_length": 5}
        file = self.write(tmp_path, *[row | {"timestamp": 1000 * time} for time in (4, 1, 3, 0, 2)])
        told: list[str] = []
        for number, expected in ((None, [0.0, 1.0, 2.0, 3.0, 4.0]), (5, [0.0, 1.0, 2.0, 3.0, 4.0]), (2, [0.0, 1.0])):
            workload = make_workload(WorkloadConfig(trace=file, num_requests=number), tell=told.append)
            assert [request.arrival_s for request in workload] == expected
        (said,) = told
        assert said == f"{file}: the first 2 of 5 requests, until 1 s; --num-requests leaves out 3, until 4 s"

    def test_more_requests_than_come_without_a_trace_come_from_one(self, tmp_path: pathlib.Path):
        assert len(make_workload(WorkloadConfig())) == 1000
        file = self.write(tmp_path, *[{"timestamp": 5, "input_length": 5, "output_length": 5}] * 1001)
        assert len(make_workload(WorkloadConfig(trace=file))) == 1001

    def test_empty_lines_count_where_a_line_is_named(self, tmp_path: pathlib.Path):
        file = tmp_path / "trace.jsonl"
        file.write_text('\n\n{"timestamp": "x", "input_length": 1, "output_length": 5}\n')
        with pytest.raises(ConfigError, match=r"trace\.jsonl, line 3: a timestamp is"):
            read_mooncake(file)

    @pytest.mark.parametrize(
        ("row", "said"),
        [
            ({"timestamp": 0, "input_length": 5}, "line 1 lacks output_length"),
            ({"timestamp": 0, "input_length": 0, "output_length": 5}, "line 1: "),
            ({"timestamp": "x", "input_length": 1, "output_length": 5}, "line 1: "),
            ({"timestamp": -5, "input_length": 1, "output_length": 5}, "line 1: "),
            ({"timestamp": float("inf"), "input_length": 1, "output_length": 5}, "line 1: "),
            ({"timestamp": 0, "input_length": float("inf"), "output_length": 5}, "a whole number, got inf"),
            ({"timestamp": 0, "input_length": 5.7, "output_length": 5}, "a whole number, got 5.7"),
            ({"timestamp": 0, "input_length": 1, "output_length": True}, "a whole number, got True"),
            ({"timestamp": 0, "input_length": 1, "output_length": -1}, "a whole number, got -1"),
            ({"timestamp": 10**400, "input_length": 1, "output_length": 1}, "line 1: "),
            ({"timestamp": None, "input_length": 1, "output_length": 1}, "milliseconds, got None"),
        ],
    )
    def test_what_is_wrong_with_a_file_is_said(self, tmp_path: pathlib.Path, row: object, said: str):
        with pytest.raises(ConfigError, match=said):
            read_mooncake(self.write(tmp_path, row))

    def test_an_empty_file_and_a_standstill_are_refused(self, tmp_path: pathlib.Path):
        with pytest.raises(ConfigError, match="no request"):
            read_mooncake(self.write(tmp_path))
        with pytest.raises(ConfigError, match="speed"):
            read_mooncake(self.write(tmp_path), speed=0.0)
