"""Gaussian latents whose spreads are multiples of one conjugate latent: what is asked of them.

Given the scale they are Gaussian about a mean m that does not depend on it; by themselves they are of a
Student distribution, with the scale they are drawn jointly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.errors import UsageError, message
from pyro_em.families.conjugate_draws import drawn
from pyro_em.families.conjugate_kernels import matrix_of
from pyro_em.posteriors.conjugates.conjugate_cells import ElementsRead
from pyro_em.posteriors.conjugates.conjugate_solution import ConjugateSolution
from pyro_em.posteriors.gaussians.integrated import Blocks, Solution
from pyro_em.updates.expectations.linear_moments import LinearMoments


@dataclass(frozen=True, eq=False)
class ScaledGaussian:
    """See the module's text, and `pyro_em.posteriors.gaussians.integrated.Integrated`.

    Attributes:
        at: The Gaussian latents where the scale is at its mean.
        scale: What is known of the scale.
        readings: Which element of it each number of a latent has, or each vector under a matrix; by the
            number of the latent's site.
        count: What the log density of one of these has of the scale's first statistic.
    """

    at: Solution
    scale: ConjugateSolution
    readings: Mapping[int, ElementsRead]
    count: float

    @property
    def layout(self) -> Blocks:
        """Blocks and places."""
        return self.at.layout

    @property
    def cells(self) -> int:
        """Combinations of discrete values."""
        return self.at.cells

    def mean(self, latent: int) -> Tensor:
        """The centre of the posterior, which is the mean where there is one. # (cells, n, q)"""
        return self.at.mean(latent)

    def tails(self, latent: int) -> tuple[Tensor, Tensor] | None:
        """Degrees of freedom, and by what S is multiplied in the scale; None where the scale is known.

        Args:
            latent: The number of the latent's site.

        Returns:
            # (cells, n, q) each, or (cells, n, 1) where numbers of one event have one scale

        Raises:
            UsageError: If some numbers of an event have one scale, and others another.
        """
        if self.scale.values is not None:
            return None
        degrees, factor, _ = self.scale.kernel.tails(self.scale.chi)
        out = self._of_numbers(latent, degrees), self._of_numbers(latent, factor)
        elements = self.readings[latent].elements
        ids = elements.T.reshape(elements.shape[1], -1, out[0].shape[-1]).sort(-1).values
        alike = ids[..., 1:] == ids[..., :-1]
        if not bool(alike.any()):
            return out
        if not bool(alike.all()):
            raise UsageError(self._without_name(latent))
        return out[0][..., :1], out[1][..., :1]

    def _without_name(self, latent: int) -> str:
        name = self.layout.sites[latent].name
        return message(
            f"marginal('{name}')",
            "some numbers of its event have one scale, and others another.",
            "no distribution of Pyro is a Student distribution of such blocks",
            [f"ask for moments: mean('{name}'), covariance('{name}')", "draw: sample(n)"],
        )

    def spread_of(
        self, latent_a: int, elements_a: Tensor, latent_b: int, elements_b: Tensor
    ) -> Tensor:
        """S, the covariance where the scale is at its mean. # (cells, m, q_a, q_b)"""
        return self.at.covariance_of(latent_a, elements_a, latent_b, elements_b)

    def covariance_of(
        self, latent_a: int, elements_a: Tensor, latent_b: int, elements_b: Tensor
    ) -> Tensor:
        """The covariance of pairs of elements, infinite where there is none. # (cells, m, q_a, q_b)"""
        found = self.spread_of(latent_a, elements_a, latent_b, elements_b)
        if self.scale.values is not None:
            return found
        spread = self._of_numbers(latent_a, self.scale.kernel.tails(self.scale.chi)[2])
        spread = spread[:, elements_a].unsqueeze(-1)
        # Numbers that covary have one scale.
        return torch.where(found == 0, found, found * spread)

    def coefficients(self, site: int) -> Tensor:
        """(C, b), of which the mean of a site is made. # (cells|1, rows|1, D, Q + 1)"""
        return self.at.coefficients(site)

    def linear_moments(self, site: int, diagonal: bool = False) -> LinearMoments:
        """Moments where the scale is at its mean, of residuals and of φ = (unknowns, 1)."""
        return self.at.linear_moments(site, diagonal)

    def sample(self, n: int, generator: torch.Generator | None = None) -> list[Tensor]:
        """Joint draws of all latents, with a scale of their own. # (n, cells, elements, q) each"""
        if self.scale.values is not None:
            return self.at.sample(n, generator)
        chi = self.scale.chi
        scales = drawn(self.scale.kernel, chi.expand(n, *chi.shape).contiguous(), generator)
        return self._scaled(self.at.sample(n, generator), scales)

    def sample_given(
        self, n: int, generator: torch.Generator | None, scales: Tensor
    ) -> list[Tensor]:
        """Draws given those of the scale. # (n, cells, elements, q) each

        Args:
            n: Number of draws.
            generator: Source of randomness; torch's global state if None.
            scales: Values of the scale's elements. # (n, elements of the scale, *event)
        """
        return self._scaled(self.at.sample(n, generator), scales.to(torch.float64).unsqueeze(2))

    def _scaled(self, draws: list[Tensor], scales: Tensor) -> list[Tensor]:
        """Draws at the mean of the scale, moved to where it is. # (n, cells, elements, q) each

        Args:
            draws: # (n, cells, elements, q) each
            scales: Values of the scale's elements. # (n, elements, cells or 1, *event)
        """
        out = []
        for latent, draw in zip(sorted(self.readings), draws, strict=True):
            off = draw - self.mean(latent)
            if self._is_number:
                at = self._of_numbers(latent, -self.scale.t[..., 1])
                each = self._of_draws(latent, scales**self.scale.kernel.power)
                moved = off * (at / each).sqrt()
            else:
                at = torch.linalg.cholesky(-2 * matrix_of(self.scale.t))
                each = torch.linalg.cholesky(scales)
                noise = self._of_numbers(latent, at)[:, :, 0].mT @ off.unsqueeze(-1)
                each = self._of_draws(latent, each)[:, :, :, 0].mT
                each = each.expand(*noise.shape[:-2], *each.shape[-2:])
                moved = torch.linalg.solve_triangular(each, noise, upper=True).squeeze(-1)
            out.append(self.mean(latent) + moved)
        return out

    def _of_draws(self, latent: int, draws: Tensor) -> Tensor:
        """As `_of_numbers`, of draws. # (n, cells or 1, elements, q or 1, *event)

        Args:
            latent: The number of the latent's site.
            draws: # (n, elements of the scale, cells or 1, *event)
        """
        return self._of_numbers(latent, draws.movedim(0, 2)).movedim(3, 0)

    def entropy(self) -> Tensor:
        """Given the scale, expected. # (cells, blocks)"""
        out = self.at.entropy()
        t = self.scale.t
        off = self.count * (self.scale.kernel.at_mean(t) - t)[..., 0]
        for latent in self.readings:
            each = self._of_numbers(latent, off)
            width = self.layout.sites[latent].width if self._is_number else 1
            each = each.expand(*each.shape[:2], width).sum(-1)
            each = each.expand(out.shape[0], -1)
            out = out.index_add(1, self.layout.block_of_element(latent), each)
        return out

    def is_of(self, other: object) -> bool:
        """Whether it is the posterior that another one is."""
        if self is other or not isinstance(other, ScaledGaussian):
            return self is other
        return self.scale.is_of(other.scale) and self.at.is_of(other.at)

    @property
    def _is_number(self) -> bool:
        return self.scale.kernel.support == "positive"

    def _of_numbers(self, latent: int, values: Tensor) -> Tensor:
        """What elements of the scale have, at the numbers of a latent that have them.

        Args:
            latent: The number of the latent's site.
            values: # (elements of the scale, cells or 1, *tail)

        Returns:
            # (cells or 1, n, q or 1, *tail)
        """
        rows = self.readings[latent].taken(values).movedim(1, 0)
        n, tail = self.layout.sites[latent].rows, rows.shape[2:]
        if rows.shape[1] == 1:
            return rows.unsqueeze(2).expand(-1, n, 1, *tail)
        return rows.reshape(len(rows), n, -1, *tail)
