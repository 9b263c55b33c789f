"""Reading from XLA's text what runs beside collectives."""

from benchmarks.collective_schedule import Schedule, read_schedule

FUSED_KERNEL = """
%around_kernel (p: bf16[2,8,1,64], q: bf16[8,1,64]) -> f32[8,1,64] {
  %p = bf16[2,8,1,64]{3,2,1,0} parameter(0)
  %slice.1 = bf16[1,8,1,64]{3,2,1,0} slice(%p), slice={[1:2], [0:8], [0:1], [0:64]}
  ROOT %mpmd_map.1 = f32[8,1,64]{2,1,0} custom-call(%q, %slice.1), custom_call_target="mosaic_gpu_v2"
}
"""
KERNEL = '%kernel = (f32[8,1,64]{2,1,0}) custom-call(%q), custom_call_target="mosaic_gpu_v2", api_version=TYPED'
FUSION = "%fusion = f32[8,1,64]{2,1,0} fusion(%p, %q), kind=kCustom, calls=%around_kernel"
OTHER = "%other = f32[8]{0} fusion(%y), kind=kLoop, calls=%added"


def pair(number: int, kind: str = "collective-permute") -> tuple[str, str]:
    """Start and end of a collective."""
    start = f"%start.{number} = ((bf16[8]{{0}}), bf16[8]{{0}}) {kind}-start(%x), channel_id=1"
    return start, f"%done.{number} = bf16[8]{{0}} {kind}-done(%start.{number})"


def read(*instructions: str) -> Schedule:
    body = "".join(f"  {instruction}\n" for instruction in instructions)
    return read_schedule(FUSED_KERNEL + "\nENTRY %main (x: bf16[8]) -> bf16[8] {\n" + body + "}\n")


def counts(schedule: Schedule) -> tuple[int, int]:
    return schedule.beside_kernel, schedule.beside_nothing


def test_a_collective_around_a_kernel_runs_beside_it():
    start, done = pair(7)
    assert counts(read(start, KERNEL, done)) == (1, 0)
    assert counts(read(start, OTHER, KERNEL, OTHER, done)) == (1, 0)


def test_a_kernel_in_a_fusion_with_its_slices_counts():
    start, done = pair(7)
    assert counts(read(start, FUSION, done)) == (1, 0)


def test_a_collective_that_ends_before_the_kernel_begins_is_hidden_by_nothing():
    start, done = pair(7)
    assert counts(read(start, OTHER, done, KERNEL)) == (0, 1)
    assert counts(read(KERNEL, start, done)) == (0, 1)


def test_each_of_several_collectives_counts_for_itself():
    (start_a, done_a), (start_b, done_b) = pair(1), pair(2, "all-gather")
    assert counts(read(start_a, KERNEL, start_b, done_a, done_b)) == (1, 1)
    assert counts(read(start_a, start_b, KERNEL, done_b, done_a)) == (2, 0)


def test_synchronous_collectives_hide_behind_nothing():
    start, done = pair(3)
    marked = start + ', backend_config={"collective_backend_config":{"is_sync":true}}'
    assert counts(read(marked, KERNEL, done)) == (0, 1)
    assert counts(read(KERNEL, "%p = bf16[8]{0} collective-permute(%x), channel_id=1")) == (0, 1)


def test_copies_are_counted_in_bytes():
    copies = "%copy.1 = bf16[4,8,2]{2,1,0} copy(%x)", "ROOT %copy.2 = s32[] copy(%y)"
    assert read(*copies, KERNEL).copied_bytes == 4 * 8 * 2 * 2 + 4
    assert read(KERNEL).copied_bytes == 0
