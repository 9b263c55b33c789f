"""What is known of running requests together is what each of them says."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from loongjax.core.request import NO_SLO, ServiceLevel
from loongjax.scheduler.running import Running
from tests.scheduler.views import running

SLOS = [NO_SLO, ServiceLevel(), ServiceLevel(ttft_s=1.0), ServiceLevel(tpot_s=0.1)]


def test_tokens_by_hand() -> None:
    """At rest, the newest token has no keys."""
    requests = Running(
        [
            running("rests", 0, (1, 7), num_output_tokens=3, max_new_tokens=10),
            running("flies", 1, (1, 8), num_output_tokens=3, max_new_tokens=20, is_in_flight=True),
        ]
    )
    assert requests.outputs == ([3, 3], [13, 23])
    assert requests.table.tolist() == [[7, 8], [2, 3], [13, 23]]
    assert (requests.num_tokens, requests.max_total_tokens) == (15, 18 + 28)


def test_nobody() -> None:
    assert Running().outputs == ([], [])
    assert Running().table.shape == (3, 0)
    assert (Running().num_tokens, Running().max_total_tokens) == (0, 0)
    assert Running().are_plain
    assert not Running().have_paces


@given(
    st.lists(
        st.tuples(st.integers(1, 50), st.integers(1, 9), st.integers(1, 30), st.booleans(), st.integers(-1, 1)),
        max_size=5,
    ),
    st.lists(st.sampled_from(SLOS), min_size=5, max_size=5),
)
def test_any_requests(those: list[tuple[int, int, int, bool, int]], slos: list[ServiceLevel]) -> None:
    """Each of so many prompt tokens, generated tokens and further ones, perhaps in flight, of some priority."""
    requests = Running(
        [
            running(
                f"r{order}",
                order,
                (0, num_prompt + num_outputs - (not is_in_flight)),
                num_output_tokens=num_outputs,
                max_new_tokens=num_more,
                is_in_flight=is_in_flight,
                priority=priority,
                slo=slos[order],
            )
            for order, (num_prompt, num_outputs, num_more, is_in_flight, priority) in enumerate(those)
        ]
    )
    assert requests.outputs == (
        [outputs for _, outputs, *_ in those],
        [outputs + more for _, outputs, more, *_ in those],
    )
    assert requests.table.T.tolist() == [
        [prompt + keyed, keyed, outputs + more]
        for prompt, outputs, more, is_in_flight, _ in those
        for keyed in [outputs - (not is_in_flight)]
    ]
    assert requests.max_total_tokens == sum(prompt + outputs + more for prompt, outputs, more, *_ in those)
    assert requests.num_tokens == sum(request.num_tokens for request in requests)
    assert requests.have_paces == any(slo.tpot_s is not None for slo, _ in zip(slos, those, strict=False))
    assert requests.are_plain == (not requests.have_paces and all(priority == 0 for *_, priority in those))
