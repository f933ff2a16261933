"""What is predicted of observed sites that read Gaussian latents.

A row y = b + Σ C h + ε, ε ~ N(0, R), has given the latents' posterior N(m, S)

    E[y] = b + Σ C m,     Cov(y) = C S Cᵀ + R,

and where discrete values change any of it the mixture of these over the values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from pyro_em.errors import UsageError, message
from pyro_em.graph.factors import Group, seen_entries
from pyro_em.posteriors.answers.gaussian_faces import GaussianFaces
from pyro_em.posteriors.answers.normal_mixtures import NormalsByCell
from pyro_em.posteriors.gaussians.integrated import Integrated
from pyro_em.updates.expectations.gaussian_rows import event_shape, rows_of


@runtime_checkable
class OfData(Protocol):
    """A solution that knows the data that it was made of."""

    def seeing(self, kept: Mapping[int, Tensor]) -> Integrated:
        """The posterior given some of the data.

        Args:
            kept: By the number of an observed site which of its rows are seen; all of a site that is
                not named. # (rows,) each
        """
        ...

    def moments(self, site: int) -> tuple[Tensor, Tensor]:
        """Mean and covariance of what the rows of an observed site read, terms beside each other.

        Returns:
            # (cells, rows, Q), (cells, rows, Q, Q)
        """
        ...

    def noise(self, site: int) -> Tensor:
        """The covariance of a site given all latents. # (cells|1, rows|1, D, D)"""
        ...

    def read_of_draws(self, site: int, drawn: Sequence[Tensor]) -> Tensor:
        """What the rows of an observed site read of draws.

        Args:
            site: Its number.
            drawn: As `Integrated.sample` gives them. # (n, cells, elements, q) each

        Returns:
            # (n, cells, rows, Q)
        """
        ...


def line_moments(solution: Integrated, site: int) -> tuple[Tensor, Tensor]:
    """Mean and covariance of b + Σ C h, without the site's own noise.

    Args:
        solution: The posterior of the latents.
        site: The number of the site.

    Returns:
        # (cells, rows, D), (cells, rows, D, D)

    Raises:
        UsageError: If they are not known: the moments of the latents were given.
    """
    found = known_data(solution)
    both = solution.coefficients(site)  # (cells|1, rows|1, D, Q + 1)
    C, b = both[..., :-1], both[..., -1]
    mean, covariance = found.moments(site)
    return b + (C @ mean.unsqueeze(-1)).squeeze(-1), C @ covariance @ C.mT


def known_data(solution: Integrated) -> OfData:
    """A solution that knows its data.

    Raises:
        UsageError: If it does not: its moments were given.
    """
    if isinstance(solution, OfData):
        return solution
    raise UsageError(
        message(
            "posterior",
            "these are moments that were given, of which no data are known.",
            "predictions follow from the data before them",
            ["ask the posterior of the data: em.posterior(x)"],
        )
    )


def predicted(faces: GaussianFaces, g: int, i: int, noise: Tensor) -> NormalsByCell:
    """What is predicted of the observed sites of one group.

    Args:
        faces: The Gaussian latents of a posterior.
        g: The number of the graph's group.
        i: The number of the group in its block.
        noise: The covariance of its rows given the latents. # (cells|1, rows|1, D, D)
    """
    mean, covariance = line_moments(faces.solved[g], i)
    variance = (covariance + noise).diagonal(dim1=-2, dim2=-1)
    return NormalsByCell(mean, variance, faces.weights(g, i))


def value_rows(group: Group) -> Tensor:
    """The observed values of a group, NaN where nothing was observed. # (rows, D)"""
    value = rows_of(group, group.value)[0].to(torch.float64)
    seen = seen_entries(group)
    if seen is not None:
        value = torch.where(rows_of(group, seen)[0], value, torch.nan)
    rows = len(group.members) * torch.Size(group.sizes[: group.n_plates]).numel()
    return value.expand(rows, event_shape(group).numel())
