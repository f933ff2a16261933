"""How fast the contenders of a comparison close the gap to the best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pyro_em.plotting.axes import colour, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pyro_em.comparison.table import Comparison


def comparison(result: Comparison, axes: Sequence[Axes] | None = None) -> tuple[Axes, Axes]:
    """Draw the gap to the best per datum against steps and against seconds.

    Lines are medians over seeds, bands reach from the worst to the best seed. Gaps below 1e-9 are
    drawn there, and the start, at zero steps, has no place on a logarithmic axis.

    Args:
        result: What `pyro_em.compare` returned.
        axes: Two axes to draw on; new ones by default.

    Returns:
        The two axes.
    """
    from matplotlib.ticker import NullFormatter

    left, right = new_axes(2, (10, 4.2)) if axes is None else axes
    by_evidence = result.measure == "evidence"
    for c, (label, curves) in enumerate(result.curves.items()):
        sound = [curve for curve in curves if len(curve.measure(by_evidence)[0]) > 1]
        if not sound:
            continue
        steps, gap, seconds = result.gaps(sound)
        row = result[label]
        rate = "" if row.learning_rate is None else f" (rate {row.learning_rate:g})"
        middle = np.median(gap, 0)
        for ax, x in ((left, steps), (right, seconds)):
            dot = "o" if len(steps) < 60 else ""
            ax.plot(x, middle, dot + "-", color=colour(c), label=label + rate, markersize=3)
            if len(gap) > 1:
                ax.fill_between(x, gap.min(0), gap.max(0), color=colour(c), alpha=0.2, linewidth=0)
    for ax, name in ((left, "steps"), (right, "wall-clock seconds")):
        ax.axhline(result.tolerance, color="#7f7f7f", linewidth=0.8, linestyle=":")
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.xaxis.set_minor_formatter(NullFormatter())  # they would overlap within a decade
        ax.set_xlabel(name)
        ax.set_ylabel(f"gap to the best log {result.measure} (nats per datum)")
        ax.grid(True, which="major", linewidth=0.4, alpha=0.5)
    left.legend(fontsize="small")
    return left, right
