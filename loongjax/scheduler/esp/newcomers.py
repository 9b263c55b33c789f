"""What prefills cost requests that are still to come: nothing as long as these find an instance to start on.

If no instance is to be had for the next H seconds, who arrives t seconds from now waits H - t, where on an idle
instance it would start at once, but take p seconds longer than on all of them. So where weight arrives at lambda a
second (`arrivals`), what could be saved is

    integral from 0 to H of lambda x max(0, H - t - p) dt  =  lambda x max(0, H - p)^2 / 2.

An idle instance makes H zero, and so does one that decodes and has room, which short prompts may pause at little cost.
H is above 0 only if all instances prefill; then it is the time until the first of them ends.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping

from loongjax.core.cluster import InstanceId
from loongjax.scheduler.draft import Draft
from loongjax.scheduler.esp.arrivals import Arrivals
from loongjax.scheduler.esp.outlook import Outlook
from loongjax.scheduler.esp.times import Times


class Newcomers:
    """Those who are still to come.

    Args:
        arrivals: what has been seen of others.
        draft: the cluster.
        outlook: when instances should be free.
        times: predictions.
    """

    def __init__(self, arrivals: Arrivals, draft: Draft, outlook: Outlook, times: Times) -> None:
        self.weight_per_s = arrivals.weight_per_s(draft.view.now_s)
        self._arrivals = arrivals
        self._times = times
        self._draft = draft
        self._outlook = outlook

    def wait_s(self, taken: Mapping[InstanceId, float]) -> float:
        """Until they can start somewhere: the H above, if instances are taken for so many seconds from now."""
        wait_s = min([*taken.values(), self.wait_elsewhere_s(taken)])
        return 0.0 if wait_s == math.inf else wait_s

    def wait_elsewhere_s(self, taken: Collection[InstanceId]) -> float:
        """Until they can start on an instance that is not taken; inf if never."""
        draft, least_s = self._draft, math.inf
        for instance, until_free_s in enumerate(self._outlook.until_free_s):
            if instance not in taken and until_free_s < math.inf and draft.room(instance) > 0:
                if instance not in draft.prefilling:
                    return 0.0
                least_s = min(least_s, until_free_s)
        return least_s

    def have_to_wait(self, taken: Collection[InstanceId]) -> bool:
        """Whether anybody is to come, and could start nowhere at once if these instances were taken."""
        return self.weight_per_s > 0.0 and self.wait_elsewhere_s(taken) > 0.0

    def cost(self, taken: Mapping[InstanceId, float]) -> float:
        """What their waiting costs then, in seconds x weight, beyond what they would lose on an idle instance."""
        if not self.weight_per_s:
            return 0.0
        wait_s = self.wait_s(taken)
        if not wait_s:
            return 0.0
        saved_s = max(0.0, wait_s - self.slower_alone_s)
        return self.weight_per_s * saved_s * saved_s / 2.0

    @functools.cached_property
    def slower_alone_s(self) -> float:
        """The p above, of the mean length of what weighs."""
        sums = self._arrivals.sums
        return self._times.batch_of_s(1, *sums) - self._times.batch_of_s(self._draft.shape.num_instances, *sums)
