"""What latents are that were integrated: which belong together, their moments, their evidence.

A dense block, a chain and moments that a user gave answer alike, so that bounds, M-steps and faces
take any of them. Latents and sites are named by their number in a block; everything is float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from pyro_em.posteriors.gaussians.site_forms import SiteForm
from pyro_em.updates.expectations.linear_moments import LinearMoments


class Blocks(Protocol):
    """Which unknowns of a component are solved together."""

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        ...

    @property
    def block_sizes(self) -> Tensor:
        """Unknown numbers of each block. # (blocks,)"""
        ...

    @property
    def largest(self) -> int:
        """Unknown numbers that one matrix of an E-step is about."""
        ...

    @property
    def vector_size(self) -> int:
        """All unknown numbers, padding included."""
        ...

    @property
    def sites(self) -> tuple[SiteForm, ...]:
        """The sites."""
        ...

    @property
    def block_of_row(self) -> tuple[Tensor, ...]:
        """For each site the block of each row; −1 where a row reads nothing. # (rows,) each"""
        ...

    def block_of_element(self, latent: int) -> Tensor:
        """The block of each element of a latent. # (n,)"""
        ...


class Integrated(Protocol):
    """Moments of the unknowns of a component: their posterior, or what a user gave in its place."""

    @property
    def layout(self) -> Blocks:
        """Blocks and places."""
        ...

    @property
    def cells(self) -> int:
        """Combinations of discrete values."""
        ...

    def mean(self, latent: int) -> Tensor:
        """The mean of a latent. # (cells, n, q)"""
        ...

    def covariance_of(
        self, latent_a: int, elements_a: Tensor, latent_b: int, elements_b: Tensor
    ) -> Tensor:
        """The covariance of pairs of elements. # (cells, m, q_a, q_b)"""
        ...

    def coefficients(self, site: int) -> Tensor:
        """(C, b), of which the mean of a site is made. # (cells|1, rows|1, D, Q + 1)"""
        ...

    def linear_moments(self, site: int, diagonal: bool = False) -> LinearMoments:
        """Moments of the residuals and of φ = (unknowns that the mean reads, 1)."""
        ...

    def sample(self, n: int, generator: torch.Generator | None = None) -> list[Tensor]:
        """Joint draws of all latents. # (n, cells, elements, q) each"""
        ...

    def entropy(self) -> Tensor:
        """In nats. # (cells, blocks)"""
        ...

    def is_of(self, other: object) -> bool:
        """Whether it is the posterior that another one is."""
        ...


@runtime_checkable
class Solution(Integrated, Protocol):
    """The posterior of the unknowns of a component at parameters, with its evidence."""

    @property
    def log_evidence(self) -> Tensor:
        """Nats of each block. # (cells, blocks)"""
        ...

    @property
    def degenerate(self) -> bool:
        """Whether an observed entry that counts has no spread: nothing here is valid then."""
        ...

    def constant_rows(self, site: int) -> Tensor:
        """Log density of observed rows that read no latent, 0 for all others. # (cells, rows)"""
        ...

    def prior_draw(self, generator: torch.Generator) -> dict[int, Tensor]:
        """One draw of all latents from their prior, by the number of the site. # (cells, n, q) each"""
        ...

    def counted_coefficients(self, site: int) -> Tensor:
        """C, zero at entries of weight zero. # (cells|1, rows|1, D, Q)"""
        ...

    def residual_at(self, site: int, read: Tensor, own: Tensor | None = None) -> Tensor:
        """y − b − C u at some values; zero at observed entries of weight zero. # (cells|1, rows, D)"""
        ...

    def read_of(self, site: int, values: Mapping[int, Tensor]) -> Tensor:
        """What the rows of a site read of values of all latents. # (rows, Q), of (n, q) each"""
        ...

    def read_covariance(self, site: int, covariances: Mapping[int, Tensor]) -> Tensor:
        """The same of covariances of independent elements. # (rows, Q, Q), of (n, q, q) each"""
        ...
