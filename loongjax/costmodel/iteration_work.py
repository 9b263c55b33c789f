"""Iterations in the numbers that their time depends on."""

from __future__ import annotations

from loongjax.core.iteration import DecodeIteration, ExtendIteration, Iteration, PrefillIteration
from loongjax.costmodel.work import DecodeWork, PrefillWork


def work_of(iteration: Iteration) -> PrefillWork | DecodeWork | None:
    """What a prefill, an extend or a decode step has to do; None for anything else.

    An extend is a prefill with keys before its tokens: it runs through the model as one, its decodes included.
    """
    match iteration:
        case PrefillIteration():
            return PrefillWork(new_lens=tuple([len(item.token_ids) for item in iteration.inputs]))
        case ExtendIteration():
            return PrefillWork(
                new_lens=tuple([len(item.token_ids) for item in iteration.inputs]),
                past_lens=tuple([item.position for item in iteration.inputs]),
            )
        case DecodeIteration():
            num_keys = dict.fromkeys(iteration.group.instances, 0)
            for sub_batch in iteration.sub_batches:
                for item in sub_batch.inputs:
                    for table in item.tables:
                        num_keys[table.instance] += table.num_tokens
            return DecodeWork(
                rows=tuple([len(sub_batch.inputs) for sub_batch in iteration.sub_batches]),
                keys=tuple(num_keys.values()),
            )
    return None


def works_of_steps(iteration: DecodeIteration, work: DecodeWork, num_steps: int) -> list[DecodeWork]:
    """Works of so many steps of a decode, the first of which has this one; each adds a key a request, on its master."""
    more = new_keys(iteration)
    return [
        DecodeWork(rows=work.rows, keys=tuple([held + step * new for held, new in zip(work.keys, more, strict=True)]))
        for step in range(num_steps)
    ]


def new_keys(iteration: DecodeIteration) -> tuple[int, ...]:
    """Keys that each step adds to each instance of the group, in canonical order."""
    rows = {batch.master: len(batch.inputs) for batch in iteration.sub_batches}
    return tuple([rows.get(instance, 0) for instance in iteration.group.instances])
