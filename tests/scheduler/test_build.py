"""From names to policies."""

import json
import pathlib

import pytest

from loongjax.config import POLICIES, EngineConfig, SchedulingConfig
from loongjax.core.cluster import ClusterShape
from loongjax.costmodel.roofline import DeviceRates, RooflineModel
from loongjax.errors import ConfigError
from loongjax.scheduler.build import build_policy, max_request_tokens, max_whole_prompt_len, warn_of_unread_settings
from loongjax.scheduler.policy import Policy
from tests.costmodel.shapes import LLAMA2_7B
from tests.scheduler.views import cluster, waiting

FOUR = ClusterShape(num_instances=4, num_pages=10, page_size=16)
ROOFLINE = RooflineModel(rates=DeviceRates.of_device("H200"), model=LLAMA2_7B)
ONE = ClusterShape(num_instances=1, num_pages=10, page_size=16, tp=4)


def config(name: str) -> SchedulingConfig:
    return SchedulingConfig(policy=name)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", POLICIES)
def test_every_name_is_a_policy(name: str):
    shape = ONE if name == "prefill-first" else FOUR
    policy = build_policy(config(name), shape=shape, max_num_seqs=8, cost_model=ROOFLINE)
    assert isinstance(policy, Policy)
    assert isinstance(policy.copy(), type(policy))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("policy", "fifo", f"--policy must be one of {', '.join(POLICIES)}, got 'fifo'"),
        ("admission", "best", "--admission must be one of quantile, worst-case, got 'best'"),
    ],
)
@pytest.mark.parametrize("kind", [SchedulingConfig, EngineConfig])
def test_an_unknown_name_is_refused_with_those_that_are_known(
    kind: type[SchedulingConfig], field: str, value: str, message: str
):
    made = kind()
    object.__setattr__(made, field, value)  # past the type checks, as a user without them
    with pytest.raises(ConfigError, match=message):
        made.__post_init__()


@pytest.mark.parametrize(
    ("name", "expected"),
    [("esp", 641), ("simple", 641), ("static", 641), ("replicated", 161), ("disaggregated", 161)],
)
def test_the_longest_request_is_what_the_instances_that_it_may_use_hold(name: str, expected: int):
    assert max_request_tokens(config(name), FOUR, max_num_batched_tokens=10_000) == expected
    # 160 slots an instance; the last token needs none, but a prefill may have to take it.
    assert max_request_tokens(config(name), FOUR, max_num_batched_tokens=100) == (expected // 160) * 100


def test_where_prompts_are_cut_only_the_pool_and_what_cannot_be_cut_have_limits():
    assert max_request_tokens(config("chunked"), FOUR, max_num_batched_tokens=100) == 161
    assert max_whole_prompt_len(config("chunked"), max_num_batched_tokens=100) == 100
    assert all(max_whole_prompt_len(config(name), 100) is None for name in POLICIES if name != "chunked")


def test_decisions_are_explained_in_a_file(tmp_path: pathlib.Path):
    path = tmp_path / "why.jsonl"
    view = cluster(waits=[waiting(f"w{i}", i, 100) for i in range(4)])
    settings = SchedulingConfig(policy="esp", explain=str(path))
    policy = build_policy(settings, shape=view.shape, max_num_seqs=8, cost_model=ROOFLINE)
    assert policy.plan(view)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines
    assert all({"step", "gain", "cost"} <= line.keys() for line in lines)


CHANGED = {
    "scale_up": False,
    "admission": "worst-case",
    "explain": "why.jsonl",
    "chunk_tokens": 7,
    "num_prefill_instances": 9,
    "prefill_tokens_per_instance": 5,
    "max_requests_per_master": 3,
}


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("esp", {"scale_up", "admission", "explain"}),
        ("simple", {"prefill_tokens_per_instance", "max_requests_per_master"}),
        ("static", set()),
        ("replicated", set()),
        ("prefill-first", set()),
        ("chunked", {"chunk_tokens"}),
        ("disaggregated", {"num_prefill_instances"}),
    ],
)
def test_settings_that_a_policy_does_not_read_are_named_at_once(
    name: str, read: set[str], caplog: pytest.LogCaptureFixture
):
    warn_of_unread_settings(SchedulingConfig(policy=name, **CHANGED))  # pyright: ignore[reportArgumentType]
    (said,) = caplog.messages
    assert said.startswith(f"the policy {name} does not read ")
    assert all((f"{field}={value!r}" in said) == (field not in read) for field, value in CHANGED.items())


@pytest.mark.parametrize("name", POLICIES)
def test_settings_that_are_read_or_left_alone_are_not_spoken_of(name: str, caplog: pytest.LogCaptureFixture):
    warn_of_unread_settings(config(name))
    warn_of_unread_settings(SchedulingConfig(policy="chunked", chunk_tokens=7, cost_model="model.json"))
    assert caplog.messages == []


def test_decisions_are_not_explained_in_the_cost_model(tmp_path: pathlib.Path):
    path = tmp_path / "model.json"
    path.write_text("times")
    settings = SchedulingConfig(policy="esp", explain=str(path), cost_model=str(tmp_path / "." / "model.json"))
    with pytest.raises(ConfigError, match=r"--explain .* is the file of --cost-model"):
        build_policy(settings, shape=FOUR, max_num_seqs=8, cost_model=ROOFLINE)
    assert path.read_text() == "times"


def test_a_file_to_explain_in_that_cannot_be_written_is_refused(tmp_path: pathlib.Path):
    settings = SchedulingConfig(policy="esp", explain=str(tmp_path))
    with pytest.raises(ConfigError, match=r"--explain .* cannot be written \(Is a directory\)"):
        build_policy(settings, shape=FOUR, max_num_seqs=8, cost_model=ROOFLINE)
