"""What is predicted of observed sites that read Gaussian latents.

A row y = b + Σ C h + ε, ε ~ N(0, R), has given the latents' posterior N(m, S)

    E[y] = b + Σ C m,     Cov(y) = C S Cᵀ + R,

and where discrete values change any of it the mixture of these over the values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from pyro_em.errors import UsageError, message
from pyro_em.graph.factors import Group, seen_entries
from pyro_em.posteriors.gaussian import GaussianBlock
from pyro_em.posteriors.gaussian_faces import GaussianFaces
from pyro_em.posteriors.linear_gaussian import Integrated
from pyro_em.updates.gaussian_rows import event_shape, rows_of


@runtime_checkable
class HasNoise(Protocol):
    """A solution that knows the noises of its sites."""

    def noise(self, site: int) -> Tensor:
        """The covariance of a site given all latents. # (cells|1, rows|1, D, D)"""
        ...


@dataclass(frozen=True, eq=False)
class Predicted:
    """Rows of an observed site, predicted.

    Attributes:
        mean: Under each combination of discrete values. # (cells, rows, D)
        covariance: # (cells, rows, D, D)
        weights: The probability of each combination; None where there is one. # (cells, rows)
        value: What was observed, NaN where nothing was. # (rows, D)
    """

    mean: Tensor
    covariance: Tensor
    weights: Tensor | None
    value: Tensor

    def standardised(self) -> Tensor:
        """(y − E[y]) / sd(y) of each entry; NaN where nothing was observed. # (rows, D)"""
        variance = self.covariance.diagonal(dim1=-2, dim2=-1)
        if self.weights is None:
            mean, own = self.mean[0], variance[0]
        else:
            weights = self.weights.unsqueeze(-1)
            mean = (weights * self.mean).sum(0)
            own = (weights * (variance + (self.mean - mean).square())).sum(0)
        return (self.value - mean) / own.sqrt()


def line_moments(solution: Integrated, site: int) -> tuple[Tensor, Tensor]:
    """Mean and covariance of b + Σ C h, without the site's own noise.

    Args:
        solution: The moments of the latents.
        site: The number of the site.

    Returns:
        # (cells, rows, D), (cells, rows, D, D)
    """
    form = solution.layout.sites[site]
    coefficients = solution.coefficients(site)  # (cells|1, rows|1, D, Q + 1)
    mean = coefficients[..., -1]
    rows, cells = form.rows, solution.cells
    mean = mean.expand(cells, rows, -1)
    parts, begin = [], 0
    for term in form.terms:
        width = solution.layout.sites[term.latent].width
        parts.append((term.latent, term.elements.clamp(min=0), begin, begin + width))
        begin += width
    covariance = mean.new_zeros(cells, rows, form.width, form.width)
    for latent, elements, first, end in parts:
        C = coefficients[..., first:end]
        read = solution.mean(latent)[:, elements]
        mean = mean + (C @ read.unsqueeze(-1)).squeeze(-1)
        for other, at, begin, stop in parts:
            between = solution.covariance_of(latent, elements, other, at)
            covariance = covariance + C @ between @ coefficients[..., begin:stop].mT
    return mean, covariance


def noise_of(solution: Integrated, site: int) -> Tensor:
    """The covariance of an observed site given the latents. # (cells|1, rows|1, D, D)

    Args:
        solution: The posterior of these.
        site: The number of the site.

    Raises:
        UsageError: If it is not known: the moments were given.
    """
    if isinstance(solution, HasNoise):
        return solution.noise(site)
    raise UsageError(
        message(
            "prediction_errors",
            "these are moments that were given, of which no data are known.",
            fixes=["ask the posterior of the data: em.posterior(x)"],
        )
    )


def observed_moments(faces: GaussianFaces, g: int, i: int, noise: Tensor) -> Predicted:
    """What is predicted of an observed site, and what it was.

    Args:
        faces: The Gaussian latents of a posterior.
        g: The number of the graph's group.
        i: The number of the site in its block.
        noise: The covariance given the latents. # (cells|1, rows|1, D, D)
    """
    solution = faces.solved[g]
    block = faces.graph.groups[g].nested
    assert isinstance(block, GaussianBlock)
    mean, covariance = line_moments(solution, i)
    return Predicted(mean, covariance + noise, faces.weights(g, i), value_rows(block.groups[i]))


def value_rows(group: Group) -> Tensor:
    """The observed values of a site, NaN where nothing was observed. # (rows, D)"""
    value = rows_of(group, group.value)[0].to(torch.float64)
    seen = seen_entries(group)
    if seen is not None:
        value = torch.where(rows_of(group, seen)[0], value, torch.nan)
    rows = torch.Size(group.sizes[: group.n_plates]).numel()
    return value.expand(rows, event_shape(group).numel())
