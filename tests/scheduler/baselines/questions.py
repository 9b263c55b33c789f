"""Asking a policy by its name, and telling it what has happened."""

from loongjax.config import PolicyName, SchedulingConfig
from loongjax.core.cluster import Group
from loongjax.core.plan import Decode, Extend, Plan, Prefill
from loongjax.costmodel.work import DecodeWork, PrefillWork, Strategy
from loongjax.scheduler.build import build_policy
from loongjax.scheduler.observation import IterationEnded
from loongjax.scheduler.policy import Policy
from loongjax.scheduler.validate import check_plan
from loongjax.scheduler.view import ClusterView


def policy_for(name: PolicyName, view: ClusterView, num_prefill_instances: int | None = None) -> Policy:
    config = SchedulingConfig(policy=name, num_prefill_instances=num_prefill_instances)
    return build_policy(config, shape=view.shape, max_num_seqs=view.max_num_seqs)


def ask(name: PolicyName, view: ClusterView, policy: Policy | None = None) -> tuple[Plan, ...]:
    plans = (policy or policy_for(name, view)).plan(view)
    check_plan(view, plans)
    return plans


def tell(policy: Policy, plan: Prefill | Decode | Extend, times: int = 1) -> None:
    """That such an iteration has ended."""
    is_decode = isinstance(plan, Decode)
    work = DecodeWork(rows=(1,), keys=(1,) * plan.group.dop) if is_decode else PrefillWork(new_lens=(1,))
    ended = IterationEnded(plan=plan, strategy=Strategy(plan.group.dop), work=work, elapsed_s=1.0)
    policy.observe([ended] * times)


def groups(plans: tuple[Plan, ...]) -> list[Group]:
    return [plan.group for plan in plans if isinstance(plan, Prefill | Decode)]
