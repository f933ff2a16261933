"""Figures of fits: functions that take and return matplotlib ``Axes``.

matplotlib is an extra: ``pip install pyro-em[plot]``. Nothing here shows a window or changes a
global style.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_em.result import EMResult, History

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PALETTE = ("#1f77b4", "#d95f02", "#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22")


def evidence(result: EMResult | History, ax: Axes | None = None, **style: Any) -> Axes:
    """Draw the log evidence entering each step, and after the last one.

    Args:
        result: A fit or its history.
        ax: Axes to draw on; new ones by default.
        **style: Passed to ``Axes.plot``.

    Returns:
        The axes: steps against nats.
    """
    ax = _axes(ax)
    history = result.history if isinstance(result, EMResult) else result
    path = list(history)
    if isinstance(result, EMResult) and result.log_evidence is not None:
        path.append(result.elbo)
    ax.plot(range(len(path)), path, marker="o", markersize=3, **{"color": PALETTE[0], **style})
    ax.set_xlabel("EM step")
    ax.set_ylabel("log evidence (nats)")
    ax.set_title("Log evidence per EM step")
    return ax


def responsibilities(x: Tensor, probs: Tensor, ax: Axes | None = None, size: float = 18) -> Axes:
    """Scatter two-dimensional data, each point in the mixture of its components' colours.

    Args:
        x: Data. # (N, 2)
        probs: Responsibilities. # (N, K)
        ax: Axes to draw on; new ones by default.
        size: Marker area in points².

    Returns:
        The axes.
    """
    from matplotlib.colors import to_rgb

    ax = _axes(ax)
    colours = np.array([to_rgb(PALETTE[k % len(PALETTE)]) for k in range(probs.shape[-1])])
    mixed = probs.detach().cpu().numpy() @ colours
    points = x.detach().cpu().numpy()
    ax.scatter(
        points[:, 0], points[:, 1], c=mixed.clip(0, 1), s=size, edgecolor="white", linewidth=0.3
    )
    return ax


def ellipses(
    mean: Tensor,
    covariance: Tensor,
    ax: Axes,
    levels: Sequence[float] = (0.5, 0.95),
    **style: Any,
) -> Axes:
    """Draw the regions that hold given shares of each Gaussian component.

    Args:
        mean: Component means. # (K, 2)
        covariance: Component covariances. # (K, 2, 2)
        ax: Axes to draw on.
        levels: Probability inside each ellipse.
        **style: Passed to matplotlib's ``Ellipse``.

    Returns:
        The axes.
    """
    from matplotlib.patches import Ellipse

    for k in range(len(mean)):
        values, vectors = torch.linalg.eigh(covariance[k].detach().cpu())
        angle = float(torch.rad2deg(torch.atan2(vectors[1, 1], vectors[0, 1])))
        for level in levels:
            # Chi-squared quantile with two degrees of freedom.
            radius = float(np.sqrt(-2 * np.log1p(-level)))
            long, short = (2 * radius * float(v.sqrt()) for v in (values[1], values[0]))
            ax.add_patch(
                Ellipse(
                    tuple(mean[k].tolist()),
                    long,
                    short,
                    angle=angle,
                    **{
                        "fill": False,
                        "linewidth": 1.6,
                        "edgecolor": PALETTE[k % len(PALETTE)],
                        **style,
                    },
                )
            )
        ax.plot(*mean[k].tolist(), marker="+", color=PALETTE[k % len(PALETTE)], markersize=10)
    return ax


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    from matplotlib.figure import Figure

    return Figure(figsize=(5, 4), layout="constrained").add_subplot()
