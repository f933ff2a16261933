"""Gaussian latents: random effects with their intervals, and the loadings of factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_em.arguments import shown
from pyro_em.errors import UsageError, message
from pyro_em.plotting.axes import PALETTE, or_new
from pyro_em.plotting.latents import require_shape
from pyro_em.posteriors.answers.posterior import Posterior

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def caterpillar(
    posterior: Posterior,
    ax: Axes | None = None,
    *,
    site: str,
    coordinate: int | None = None,
    level: float = 0.95,
    labels: Sequence[str] | None = None,
    ordered: bool = True,
    **style: Any,
) -> Axes:
    """Draw the posterior mean of each element of a Gaussian latent, with its interval.

    Args:
        posterior: What has the latent: ``em.posterior(...)``, or a result's.
        ax: Axes to draw on; new ones by default.
        site: The latent, in one plate; or a glob of the steps of a chain.
        coordinate: Of vectors, which entry.
        level: The probability of each interval, between 0 and 1; intervals are mean ± z sd.
        labels: A name per element; its number by default.
        ordered: Whether elements are put in the order of their means.
        **style: Passed to ``Axes.errorbar``.

    Returns:
        The axes: values of the latent against elements.

    Raises:
        UsageError: If the latent is not Gaussian, or not of one plate.
    """
    if not isinstance(posterior, Posterior):
        what = f"{shown(posterior)} is no posterior with Gaussian latents."
        raise UsageError(message("caterpillar", what, fixes=["pass em.posterior(...)"]))
    if not 0 < level < 1:
        raise UsageError(message("caterpillar", f"level={level} is no probability below 1."))
    mean, variance = posterior.mean(site), posterior.covariance(site)
    if variance.dim() > mean.dim():
        if coordinate is None:
            raise UsageError(
                message(
                    "caterpillar",
                    f"'{site}' is a vector of {mean.shape[-1]} numbers.",
                    "one number for each element is drawn",
                    ["choose one: coordinate=0 is the first"],
                )
            )
        mean = mean[..., coordinate]
        variance = variance.diagonal(dim1=-2, dim2=-1)[..., coordinate]
    require_shape("caterpillar", "mean", mean, "elements")
    order = mean.argsort() if ordered else torch.arange(len(mean), device=mean.device)
    if labels is not None and len(labels) != len(mean):
        what = f"the lengths disagree: {len(mean)} elements, {len(labels)} labels."
        raise UsageError(message("caterpillar", what, fixes=["pass one label per element"]))
    one = torch.tensor(0.5 + level / 2, dtype=torch.float64)
    z = float(torch.distributions.Normal(0.0, 1.0).icdf(one))
    half = (z * variance.clamp(min=0).sqrt())[order].cpu().numpy()
    ax = or_new(ax, (5, max(2.0, min(8.0, 0.6 + 0.18 * len(mean)))))
    places = np.arange(len(mean))
    look = {"fmt": "o", "markersize": 3.5, "linewidth": 1.2, "color": PALETTE[0], **style}
    ax.errorbar(mean[order].cpu().numpy(), places, xerr=half, **look)
    ax.axvline(0.0, color="0.7", linewidth=0.8, zorder=0)
    if labels is not None or len(mean) <= 40:
        names = [str(int(i)) if labels is None else labels[int(i)] for i in order]
        ax.set_yticks(places, names)
    else:
        ax.set_yticks([])
    ax.set_xlabel(f"{site}: mean and {level:.0%} interval")
    return ax


def loadings(
    weights: Tensor,
    ax: Axes | None = None,
    *,
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    **style: Any,
) -> Axes:
    """Draw the loadings of factors as colours, white at zero.

    A rotation of the factors gives other loadings of the same evidence.

    Args:
        weights: W, one row per observed number and one column per factor. # (D, q)
        ax: Axes to draw on; new ones by default.
        rows: A name per observed number.
        columns: A name per factor.
        **style: Passed to ``Axes.imshow``.

    Returns:
        The axes.

    Raises:
        UsageError: If the weights are no matrix, or a number of names is another than theirs.
    """
    require_shape("loadings", "weights", weights, "D, q")
    for name, names, size in zip(("rows", "columns"), (rows, columns), weights.shape, strict=True):
        if names is not None and len(names) != size:
            what = f"the lengths disagree: {len(names)} {name}, {size} in the weights."
            raise UsageError(
                message("loadings", what, fixes=[f"pass a name for each of the {name}"])
            )
    D, q = weights.shape
    ax = or_new(ax, (1.6 + 0.5 * q, max(2.0, min(8.0, 0.8 + 0.25 * D))))
    w = weights.detach().cpu().numpy()
    most = float(np.abs(w).max()) or 1.0
    look = {"cmap": "RdBu_r", "vmin": -most, "vmax": most, "aspect": "auto", **style}
    image = ax.imshow(w, **look)
    ax.figure.colorbar(image, ax=ax, label="loading")
    ax.set_xticks(range(q), [str(k + 1) for k in range(q)] if columns is None else columns)
    if rows is not None or D <= 40:
        ax.set_yticks(range(D), [str(d) for d in range(D)] if rows is None else rows)
    ax.set_xlabel("factor")
    return ax
