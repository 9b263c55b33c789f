"""What prefills cost requests that are still to come: nothing as long as these find an instance to start on.

If no instance takes a prefill for the next H seconds, who arrives t seconds from now waits H - t, and where weight
arrives at lambda a second (`arrivals`) that costs

    integral from 0 to H of lambda x (H - t) dt  =  lambda x H^2 / 2.

An idle instance makes H zero, and so does one that decodes and has room, which newcomers may pause as they are short.
H is 0 unless all instances prefill; then it is the time until the first of them ends.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from loongjax.core.cluster import InstanceId
from loongjax.scheduler.draft import Draft
from loongjax.scheduler.esp.outlook import Outlook


class Newcomers:
    """Those who are still to come.

    Args:
        weight_per_s: lambda, the weight of a second's waiting that arrives a second.
        draft: the cluster.
        outlook: when instances should be free.
    """

    def __init__(self, weight_per_s: float, draft: Draft, outlook: Outlook) -> None:
        self.weight_per_s = weight_per_s
        self._draft = draft
        self._outlook = outlook

    def wait_s(self, taken: Mapping[InstanceId, float]) -> float:
        """Until they can start somewhere: the H above, if instances are taken for so many seconds from now."""
        wait_s = min([*taken.values(), self.wait_elsewhere_s(taken)])
        return 0.0 if wait_s == math.inf else wait_s

    def wait_elsewhere_s(self, taken: Collection[InstanceId]) -> float:
        """Until they can start on an instance that is not taken; inf if never."""
        draft, until_free_s = self._draft, self._outlook.until_free_s
        return min(
            [
                until_free_s[instance] if instance in draft.prefilling else 0.0
                for instance in range(draft.shape.num_instances)
                if instance not in taken and draft.room(instance) > 0 and until_free_s[instance] < math.inf
            ],
            default=math.inf,
        )

    def cost(self, taken: Mapping[InstanceId, float]) -> float:
        """What their waiting costs then, in seconds x weight."""
        if not self.weight_per_s:
            return 0.0
        wait_s = self.wait_s(taken)
        return self.weight_per_s * wait_s * wait_s / 2.0
