"""Traced iterations for tests, by what matters to them."""

from loongjax.core.cluster import Group
from loongjax.costmodel.work import DecodeWork, PrefillWork
from loongjax_profiling.replay.traced_runtime import TracedIteration


def traced_prefill(num_tokens: int, elapsed_s: float, *, dop: int = 1, turnaround_s: float | None = None):
    return _traced(
        "prefill", PrefillWork(new_lens=(num_tokens,)), elapsed_s, dop=dop, continues=False, turnaround_s=turnaround_s
    )


def traced_decode(elapsed_s: float, *, continues: bool, dop: int = 1, turnaround_s: float | None = None):
    work = DecodeWork(rows=(1,), keys=(9,) * dop)
    return _traced("decode", work, elapsed_s, dop=dop, continues=continues, turnaround_s=turnaround_s)


def traced_recovery(elapsed_s: float):
    return _traced("recover", None, elapsed_s, dop=1, continues=False, turnaround_s=None)


def _traced(
    kind: str,
    work: PrefillWork | DecodeWork | None,
    elapsed_s: float,
    *,
    dop: int,
    continues: bool,
    turnaround_s: float | None,
) -> TracedIteration:
    return TracedIteration(
        kind=kind,
        group=Group.of(range(dop)),
        continues=continues,
        work=work,
        submitted_s=1.0,
        begin_s=1.0,
        end_s=1.0 + elapsed_s,
        turnaround_s=turnaround_s,
        error=None,
    )
