"""Kernel times from traces: which events count, and how they are cut into repetitions."""

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from loongjax_profiling.kernels.device_trace import (
    KernelEvent,
    device_times,
    read_kernels,
    times_of_repetitions,
)

TWO_STREAMS_AND_WHAT_IS_NO_KERNEL = """
planes {
  name: "/device:GPU:0"
  lines { name: "Stream #13(Compute)" timestamp_ns: 1000
    events { metadata_id: 1 offset_ps: 5000 duration_ps: 2500000 }
    events { metadata_id: 2 offset_ps: 3000000 duration_ps: 1000000 } }
  lines { name: "Stream #14(MemcpyD2D)" timestamp_ns: 2000
    events { metadata_id: 3 offset_ps: 0 duration_ps: 500000 } }
  lines { name: "XLA Ops" timestamp_ns: 1000
    events { metadata_id: 1 offset_ps: 5000 duration_ps: 2500000 } }
  event_metadata { key: 1 value { id: 1 name: "attend" } }
  event_metadata { key: 2 value { id: 2 name: "merge" } }
  event_metadata { key: 3 value { id: 3 name: "MemcpyD2D" } }
}
planes {
  name: "/host:CPU"
  lines { name: "Stream of the host" timestamp_ns: 1000 events { metadata_id: 1 offset_ps: 0 duration_ps: 1000 } }
  event_metadata { key: 1 value { id: 1 name: "PjitFunction" } }
}
"""


def events(*named: tuple[str, float, float], device: str = "/device:GPU:0") -> list[KernelEvent]:
    return [
        KernelEvent(device=device, name=name, start_ns=float(start), duration_ns=float(duration))
        for name, start, duration in named
    ]


def test_only_what_ran_in_a_stream_of_a_gpu_is_a_kernel(tmp_path):
    path = tmp_path / "host.xplane.pb"
    path.write_bytes(ProfileData.text_proto_to_serialized_xspace(TWO_STREAMS_AND_WHAT_IS_NO_KERNEL))
    assert read_kernels(path) == events(("attend", 1005, 2500), ("merge", 4000, 1000), ("MemcpyD2D", 2000, 500))


def test_a_repetition_lasts_from_its_first_kernel_to_the_end_of_its_last():
    times = times_of_repetitions(
        events(("a", 0, 4), ("b", 5, 2), ("a", 10, 4), ("b", 16, 2), ("a", 20, 4), ("b", 26, 3)), 3
    )
    assert times.span_s == pytest.approx(8e-9)  # of 7, 8 and 9
    assert times.period_s == pytest.approx(10e-9)
    assert times.kernel_s == pytest.approx({"a": 4e-9, "b": 2e-9})


def test_the_last_kernel_to_start_need_not_be_the_last_to_end():
    assert times_of_repetitions(events(("a", 0, 9), ("b", 2, 3)), 1).span_s == pytest.approx(9e-9)


def test_kernels_of_the_program_around_the_repetitions_do_not_count():
    times = times_of_repetitions(
        events(("gemm", 0, 100), ("cast", 100, 1), ("a", 101, 4), ("a", 106, 4), ("a", 111, 4), ("cast", 120, 1)), 3
    )
    assert (times.span_s, times.period_s) == pytest.approx((4e-9, 5e-9))
    assert list(times.kernel_s) == ["a"]


def test_a_kernel_that_runs_twice_in_a_repetition_counts_twice():
    times = times_of_repetitions(events(("a", 0, 3), ("a", 5, 3), ("a", 10, 3), ("a", 15, 3)), 2)
    assert times.span_s == pytest.approx(8e-9)
    assert times.kernel_s == pytest.approx({"a": 6e-9})


def test_numbers_that_xla_gives_to_kernels_of_a_kind_do_not_tell_them_apart():
    times = times_of_repetitions(events(("loop_fusion", 0, 1), ("loop_fusion_2", 2, 1), ("loop_fusion.3_1", 4, 1)), 3)
    assert list(times.kernel_s) == ["loop_fusion"]


def test_of_devices_that_work_together_the_slowest_counts_and_others_do_not():
    fast = events(("a", 100, 4), ("a", 110, 4), ("a", 120, 4))
    slow = events(("a", 0, 5), ("a", 12, 5), ("a", 24, 5), device="/device:GPU:1")
    idle = events(("head_start", 0, 500), device="/device:GPU:2")
    times = times_of_repetitions([*fast, *slow, *idle], 3)
    assert (times.span_s, times.period_s) == pytest.approx((5e-9, 12e-9))


def test_events_may_come_in_any_order():
    ordered = events(("a", 0, 4), ("b", 5, 2), ("a", 10, 4), ("b", 16, 2))
    assert times_of_repetitions(ordered[::-1], 2) == times_of_repetitions(ordered, 2)


@pytest.mark.parametrize(
    ("found", "message"), [([], "no kernels of a GPU"), (events(("a", 0, 1)), r"multiple of 2 times: \{'a': 1\}")]
)
def test_a_trace_without_repetitions_is_refused(found, message):
    with pytest.raises(ValueError, match=message):
        times_of_repetitions(found, 2)


def test_a_trace_of_a_cpu_holds_no_kernels():
    def repeat(num):
        call = jax.jit(lambda x: jax.lax.fori_loop(0, num, lambda _, x: jnp.tanh(x), x))
        return lambda: call(jnp.ones(3))

    with pytest.raises(ValueError, match="no kernels of a GPU"):
        device_times(repeat, 8)
