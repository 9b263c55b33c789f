"""The sizes to which a runtime pads, beside those that a cost model was fitted to."""

from __future__ import annotations

import logging

from loongjax.costmodel.model import CostModel, FittedModel
from loongjax.runtime.buckets import Buckets
from loongjax.runtime.protocol import Runtime

logger = logging.getLogger(__name__)


def buckets_of(runtime: Runtime) -> Buckets:
    """The sizes to which it pads."""
    return Buckets.for_limits(
        max_num_batched_tokens=runtime.limits.max_num_batched_tokens,
        max_num_seqs=runtime.limits.max_num_seqs,
        num_pages=runtime.shape.num_pages,
    )


def warn_of_other_padding(cost_model: CostModel, buckets: Buckets) -> None:
    """Warns if a model was fitted to an engine that pads to other sizes: its times are then those of other sizes."""
    if not isinstance(cost_model, FittedModel):
        return
    for times in cost_model.strategies.values():
        pairs = [("--max-num-seqs", times.decode.row_buckets, buckets.num_rows)]
        if times.refined_prefill is not None:
            pairs.append(("--max-num-batched-tokens", times.refined_prefill.token_buckets, buckets.num_tokens))
        for flag, fitted, ours in pairs:
            largest = min(ours[-1], max(fitted, default=0))
            differing = sorted(size for size in {*fitted} ^ {*ours} if size <= largest)
            if fitted and differing:
                logger.warning(
                    "the cost model was fitted to an engine that pads to %s, and this one pads to %s: measure with the "
                    "same %s",
                    fitted,
                    ours,
                    flag,
                )
                return
