"""Gaussian mixtures in the plane: responsibilities and ellipses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_em.plotting.axes import colour, or_new
from pyro_em.plotting.latents import probs_of, require_shape
from pyro_em.posteriors.answers.protocol import AnyPosterior

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def responsibilities(
    x: Tensor,
    probs: Tensor | AnyPosterior,
    ax: Axes | None = None,
    size: float = 18,
    *,
    site: str | None = None,
) -> Axes:
    """Scatter two-dimensional data, each point in the mixture of its components' colours.

    Args:
        x: Data. # (N, 2)
        probs: Responsibilities # (N, K), or a posterior.
        ax: Axes to draw on; new ones by default.
        size: Marker area in points².
        site: Of a posterior, which latent; a glob where each row is a step of a chain.

    Returns:
        The axes.

    Raises:
        UsageError: If the responsibilities are not those of rows.
    """
    from matplotlib.colors import to_rgb

    probs = probs_of("responsibilities", probs, site)
    require_shape("responsibilities", "probs", probs, "N, K")
    ax = or_new(ax)
    colours = np.array([to_rgb(colour(k)) for k in range(probs.shape[-1])])
    mixed = probs.detach().cpu().numpy() @ colours
    points = x.detach().cpu().numpy()
    ax.scatter(
        points[:, 0], points[:, 1], c=mixed.clip(0, 1), s=size, edgecolor="white", linewidth=0.3
    )
    return ax


def ellipses(
    mean: Tensor,
    covariance: Tensor,
    ax: Axes | None = None,
    levels: Sequence[float] = (0.5, 0.95),
    **style: Any,
) -> Axes:
    """Draw the regions that hold given shares of each Gaussian component.

    Args:
        mean: Component means. # (K, 2)
        covariance: Component covariances. # (K, 2, 2)
        ax: Axes to draw on; new ones by default.
        levels: Probability inside each ellipse.
        **style: Passed to matplotlib's ``Ellipse``.

    Returns:
        The axes.
    """
    from matplotlib.patches import Ellipse

    ax = or_new(ax)
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
                        "edgecolor": colour(k),
                        **style,
                    },
                )
            )
        ax.plot(*mean[k].tolist(), marker="+", color=colour(k), markersize=10)
    return ax
