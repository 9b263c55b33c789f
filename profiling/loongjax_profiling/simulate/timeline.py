"""A picture of which group did what."""

from __future__ import annotations

import collections
import math
import pathlib
from collections.abc import Iterable

from loongjax.core.cluster import InstanceId
from loongjax.runtime.simulated import Span

COLORS = {
    "prefill": "tab:orange",
    "decode": "tab:blue",
    "extend": "tab:green",
    "migrate": "tab:red",
    "recover": "tab:gray",
}


class Timeline:
    """Keeps what happens within a window of time, neighbouring steps of one decode as one."""

    def __init__(self, *, begin_s: float = 0.0, length_s: float = math.inf) -> None:
        """An empty one; nothing that lies outside the window is kept."""
        self._begin_s, self._end_s = begin_s, begin_s + length_s
        self.spans: list[Span] = []

    def note(self, span: Span) -> None:
        """Takes in something that has ended."""
        if span.end_s > self._begin_s and span.begin_s < self._end_s:
            self.spans.append(span)

    def draw(self, path: pathlib.Path, *, title: str = "") -> None:
        """Writes a picture, of the format that the path's suffix names: instances downwards, time to the right.

        Prefills are orange, decodes blue, chunks of prompts beside decodes green, migrations red; the darker, the more
        instances work together.
        """
        import matplotlib  # here: only this needs it

        matplotlib.use("agg")
        import matplotlib.pyplot as plt
        from matplotlib.patches import Patch

        bars = _bars(self.spans)
        instances = sorted({instance for _, _, instance in bars})
        most = max((dop for _, dop, _ in bars), default=1)
        figure, axes = plt.subplots(figsize=(16, max(2.0, 0.35 * len(instances) + 1.2)), layout="constrained")
        for (kind, dop, instance), intervals in bars.items():
            axes.broken_barh(
                intervals,
                (instances.index(instance) - 0.45, 0.9),
                facecolors=COLORS[kind],
                alpha=0.35 + 0.65 * dop / most,
            )
        axes.set_yticks(range(len(instances)), [str(instance) for instance in instances])
        axes.invert_yaxis()
        axes.set_xlabel("time (s)")
        axes.set_ylabel("instance")
        axes.set_title(title)
        kinds = [kind for kind in COLORS if any(kind == shown for shown, _, _ in bars)]
        axes.legend(
            handles=[Patch(color=COLORS[kind], label=kind) for kind in kinds], loc="upper right", ncols=len(kinds) or 1
        )
        figure.savefig(path, dpi=120)
        plt.close(figure)


def _bars(spans: Iterable[Span]) -> dict[tuple[str, int, InstanceId], list[tuple[float, float]]]:
    """(begin, length) of each bar, by kind, degree of parallelism and instance; bars that touch are one."""
    bars: dict[tuple[str, int, InstanceId], list[tuple[float, float]]] = collections.defaultdict(list)
    for span in sorted(spans, key=lambda span: span.begin_s):
        for instance in span.group.instances:
            intervals = bars[span.kind, span.group.dop, instance]
            if intervals and sum(intervals[-1]) == span.begin_s and span.kind == "decode":
                begin_s, _ = intervals.pop()
                intervals.append((begin_s, span.end_s - begin_s))
            else:
                intervals.append((span.begin_s, span.end_s - span.begin_s))
    return bars
