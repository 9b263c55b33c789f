"""The one interface between the engine and whatever executes iterations."""

from __future__ import annotations

import dataclasses
from typing import Protocol, runtime_checkable

from loongjax.core.cluster import ClusterShape
from loongjax.core.iteration import Completion, Iteration

WARM_UP_ROUNDS = 2
"""How often all programs are run before they are as fast as ever: XLA makes CUDA graphs of a program when it runs, and
drops them when it loads another one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RuntimeLimits:
    """What one iteration can hold. The engine and the scheduler keep within it."""

    max_model_len: int
    """Tokens of one request, prompt and output together."""
    max_num_batched_tokens: int
    """Tokens of one prefill on one instance; a group of n takes n times as many."""
    max_num_seqs: int
    """Requests of one sub-batch, and of one prefill."""
    vocab_size: int


@runtime_checkable
class Runtime(Protocol):
    """Executes iterations. Iterations on disjoint groups overlap; those that share an instance run in submission order.

    Whatever goes wrong in an iteration, on the devices or on the host, is its completion's error. What was submitted
    behind it fails as well, or computes nothing that counts, until a `RecoverIteration` on the same group.

    All methods but `wake` belong to one thread.
    """

    @property
    def shape(self) -> ClusterShape: ...

    @property
    def limits(self) -> RuntimeLimits: ...

    @property
    def num_recompiles(self) -> int:
        """Executables built or loaded since it was ready."""
        ...

    def submit(self, iteration: Iteration) -> None:
        """Starts an iteration without waiting for it."""
        ...

    def completions(self, timeout_s: float | None) -> list[Completion]:
        """Iterations that ended since the last call, in order of their end within a group.

        Waits until there is one, `wake` is called, or the time is over; None waits without limit, 0 not at all.
        """
        ...

    def wake(self) -> None:
        """Ends a wait in `completions` from another thread."""
        ...

    def now_s(self) -> float:
        """This runtime's clock, in seconds from an arbitrary start."""
        ...

    def close(self, *, waits: bool = True) -> None:
        """Gives the devices back, after what is in flight; `waits` False: it will not come back, so leave it behind."""
        ...


@runtime_checkable
class JumpingRuntime(Runtime, Protocol):
    """A runtime that can do many steps of a decode without being told of each: a simulation.

    Its tokens carry no information, so one `SampledToken` a request stands for those of all steps.
    """

    def prolong(self, iteration_id: int, num_steps: int) -> None:
        """Lets the step that a decode in flight is in, and as many after it as make `num_steps`, complete as one.

        Slots are those of the iteration for its first step, and whatever follows for the others.
        """
        ...

    def catch_up(self, *, stop: bool) -> list[Completion]:
        """What the decodes of several steps have done by now and not been asked for.

        Args:
            stop: whether each of them ends with the step that it is in.

        Returns:
            One for each that has ended steps since: `is_over` where a step ends at this very moment, and so does the
            decode then; for the others another completion follows.
        """
        ...
