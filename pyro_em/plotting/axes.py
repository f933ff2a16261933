"""What all figures share: the colours, and axes where the caller passes none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes


PALETTE = ("#1f77b4", "#d95f02", "#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22")


def colour(k: int) -> str:
    """The colour of component, state or contender k; they repeat after eight."""
    return PALETTE[k % len(PALETTE)]


def or_new(ax: Axes | None, size: tuple[float, float] = (5, 4)) -> Axes:
    """The given axes, or those of a new figure of this size in inches."""
    return new_axes(1, size)[0] if ax is None else ax


def new_axes(count: int, size: tuple[float, float]) -> Sequence[Axes]:
    """Axes side by side, sharing y, in a new figure of this size in inches."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'pyro-em[plot]'") from error
    _, axes = pyplot.subplots(
        1, count, figsize=size, layout="constrained", sharey=True, squeeze=False
    )
    return list(axes[0])
