"""Where a case's requests keep their tokens, and whether a runtime can hold and run it."""

from __future__ import annotations

from collections.abc import Iterator

from loongjax.core.cluster import ClusterShape
from loongjax.core.plan import TokenInterval
from loongjax.runtime.protocol import RuntimeLimits
from loongjax_profiling.iteration.case import Case


def spread(case: Case, page_size: int) -> Iterator[tuple[TokenInterval, ...]]:
    """For each request, its pages evenly over the group, in contiguous parts.

    The first part moves on by an instance with every request, so that the batch is even too.
    """
    sp = case.strategy.sp
    for request in range(case.batch_size):
        yield _cut(case.input_len, [(request + k) % sp for k in range(sp)], page_size)


def packed(case: Case, shape: ClusterShape) -> Iterator[tuple[TokenInterval, ...]]:
    """For each request, its tokens on the first instance of the group that has pages left, and on the next ones what it
    has none for: the fewest instances.
    """
    instance, free = 0, shape.num_pages
    for _ in range(case.batch_size):
        intervals: list[TokenInterval] = []
        begin = 0
        while begin < case.input_len:
            if not free:
                instance, free = instance + 1, shape.num_pages
            end = min(case.input_len, begin + free * shape.page_size)
            intervals.append(TokenInterval(instance, begin, end))
            free -= shape.num_pages_for(end - begin)
            begin = end
        yield tuple(intervals)


def masters_of(case: Case) -> list[int]:
    """The master of each request of a decode: even, and consecutive requests apart."""
    return [request % case.num_masters for request in range(case.batch_size)]


def why_not(
    case: Case, *, shape: ClusterShape, limits: RuntimeLimits, num_steps: int, context_len: int | None = None
) -> str | None:
    """Why a runtime cannot run this case, as a kind of reason to be counted; None if it can.

    Args:
        case: to be run.
        shape: the runtime's.
        limits: the runtime's.
        num_steps: of a decode.
        context_len: tokens that the model was made for; None: any number.
    """
    sp = case.strategy.sp
    if sp > shape.num_instances or case.strategy.tp != shape.tp:
        return "needs more devices"
    if context_len is not None and case.past_len + case.input_len > context_len:
        return "is longer than the model's context"
    rows = -(-case.num_requests // max(1, case.num_masters))
    if rows > limits.max_num_seqs:
        return "has more requests than --max-num-seqs"
    if case.kind in ("prefill", "extend") and -(-case.num_tokens // sp) > limits.max_num_batched_tokens:
        return "has more tokens an instance than --max-num-batched-tokens"
    if _most_pages(case, shape, num_steps) > shape.num_pages:
        return "does not fit into the KV pool"
    return None


def _most_pages(case: Case, shape: ClusterShape, num_steps: int) -> int:
    """Pages that the case takes on the instance where it takes most; a bound for what is packed and for new keys."""
    sp = case.strategy.sp
    request_pages = shape.num_pages_for(case.input_len)
    if case.kind == "migration":
        return request_pages
    if case.kind == "extend":
        chunk_pages, decode_pages = (shape.num_pages_for(case.past_len + new) for new in (case.input_len, 1))
        return case.batch_size * chunk_pages + case.num_decodes * decode_pages
    if case.scales_down:
        return -(-case.batch_size * request_pages // sp)
    rounds, rest = divmod(case.batch_size, sp)
    part, larger = divmod(request_pages, sp)
    # `spread` gives every instance as much in each round of sp requests; the rest may differ by a page each.
    most_of_rest = max(sum(part + ((i - request) % sp < larger) for request in range(rest)) for i in range(sp))
    new_pages = 0
    if case.kind == "decode":
        new_pages = -(-case.batch_size // case.num_masters) * (shape.num_pages_for(num_steps) + 1)
    return rounds * request_pages + most_of_rest + new_pages


def _cut(num_tokens: int, instances: list[int], page_size: int) -> tuple[TokenInterval, ...]:
    """Contiguous parts for these instances in this order: whole pages, as even as can be, the first ones larger."""
    num_pages = -(-num_tokens // page_size)
    intervals: list[TokenInterval] = []
    begin = 0
    for k, instance in enumerate(instances):
        part = num_pages // len(instances) + (k < num_pages % len(instances))
        end = min(num_tokens, begin + part * page_size)
        if end > begin:
            intervals.append(TokenInterval(instance, begin, end))
        begin = end
    return tuple(intervals)
