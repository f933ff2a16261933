"""Evidence and posterior of the continuous latents of a linear-Gaussian component.

For sites as in `gaussian_layout`, all unknowns h are written in their own noises ε ~ N(0, I):

    h = c + T ε,     Λ = I + Tᵀ M T,     M = Σ_rows Cᵀ P C,     P = (L Lᵀ)⁻¹ of observed rows,

T by substitution in topological order. No prior is inverted: variances of zero are fine. The posterior
of ε is N(m, Λ⁻¹). The evidence is taken at the mode m, which is refined until it stays,

    log p(x) = log p(x, m) + ½ d log 2π − ½ log|Λ|.

A mode that is off by δ costs δᵀΛδ/2 there: sums of large squares, whose difference would be the
answer, never meet. Where |Λ| itself would be lost to rounding, it is taken from the rows by a QR
decomposition. All is done in float64, and can be differentiated twice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyro_em.posteriors.gaussian_layout import BlockLayout, Bucket, Reading
from pyro_em.posteriors.integrated import Integrated
from pyro_em.posteriors.square_root import square_root
from pyro_em.updates.linear_moments import LinearMoments, linear_moments

_LOG_TWO_PI = math.log(2 * math.pi)


_MANY = 2**24  # numbers that the rows of one site may add to M at once


_MOST = 2**27  # numbers that the rows of some blocks may take in all


_STEPS = 6  # moves to the mode at most: the first, and mostly one refinement


_SHORT = 1e-10  # nats; one more move makes far less of it


_EPSILON = 2.0**-53


_LOSS = 1e-11  # nats that the log evidence of a block may lose where its rows could do better


@dataclass(frozen=True, eq=False)
class SiteNumbers:
    """The numbers of one site. The first dimension is that of the discrete cells conditioned on.

    Attributes:
        value: The data; None for latents. # (rows, D)
        offset: The part of the mean that reads no latent. # (cells|1, rows|1, D)
        spread: Standard deviations, # (cells|1, rows|1, D); or with `is_matrix` a lower Cholesky factor
            of the covariance. # (cells|1, rows|1, D, D)
        coefficients: Of each term. # (cells|1, rows|1, D, q) each
        is_matrix: Whether the spread is a Cholesky factor.
        weight: How much each entry counts: its log density is multiplied by it. At 0 it is missing, and
            the value may be NaN. Of observed sites only; with `is_matrix` of whole rows, D = 1, unless
            `is_apart`. # (rows|1, D|1)
        is_apart: Whether entries of weight zero are independent of the others given the mean.
    """

    value: Tensor | None
    offset: Tensor
    spread: Tensor
    coefficients: tuple[Tensor, ...] = ()
    is_matrix: bool = False
    weight: Tensor | None = None
    is_apart: bool = False


@dataclass(frozen=True, eq=False)
class _Rows:
    """One site, in float64.

    Attributes:
        coefficients: C, the terms beside each other, zero where a row reads nothing. # (·, ·, D, Q)
        spread: Standard deviations or Cholesky factors, one where the entry is missing.
        is_matrix: Which of the two.
        value: The data, zero where missing; None for latents. # (rows, D)
        offset: # (·, ·, D)
        weight: None if every entry counts once. # (rows|1, D|1)
        degenerate: Whether an entry that counts has no spread.
    """

    coefficients: Tensor
    spread: Tensor
    is_matrix: bool
    value: Tensor | None
    offset: Tensor
    weight: Tensor | None
    degenerate: bool

    @cached_property
    def whitened(self) -> Tensor:
        """L⁻¹ C. # (·, ·, D, Q)"""
        if not self.is_matrix:
            return self.coefficients / self.spread.unsqueeze(-1)
        if self.spread.shape[1] > 1:
            return torch.linalg.solve_triangular(self.spread, self.coefficients, upper=False)
        # One factor for all rows: their columns side by side, so that it is not copied for each.
        k, rows, D, Q = self.coefficients.shape
        beside = self.coefficients.transpose(1, 2).reshape(k, D, rows * Q)
        solved = torch.linalg.solve_triangular(self.spread[:, 0], beside, upper=False)
        return solved.reshape(solved.shape[0], D, rows, Q).transpose(1, 2)

    @property
    def deviations(self) -> Tensor:
        """Standard deviations, or the diagonal of the Cholesky factor. # (·, ·, D)"""
        return self.spread.diagonal(dim1=-2, dim2=-1) if self.is_matrix else self.spread

    def whiten(self, r: Tensor) -> Tensor:
        """L⁻¹ r. # (cells, rows, D)"""
        if not self.is_matrix:
            return r / self.spread
        if self.spread.shape[1] == 1:
            return torch.linalg.solve_triangular(self.spread[:, 0], r.mT, upper=False).mT
        columns = r.unsqueeze(-1)
        return torch.linalg.solve_triangular(self.spread, columns, upper=False).squeeze(-1)

    def weigh(self, x: Tensor) -> Tensor:
        """w x. # (cells, rows, D)"""
        return x if self.weight is None else x * self.weight

    def log_density(self, r: Tensor) -> Tensor:
        """log N(r | 0, L Lᵀ) of each row, weighted. # (cells, rows)"""
        terms = -0.5 * (self.whiten(r).square() + _LOG_TWO_PI) - self.deviations.log()
        return self.weigh(terms).sum(-1)


@dataclass(frozen=True, eq=False)
class _Factor:
    """The factors of the matrices of one bucket.

    Attributes:
        bucket: Which one.
        T: # (cells, B, d, d)
        cholesky: The lower factor of Λ. # (cells, B, d, d)
    """

    bucket: Bucket
    T: Tensor
    cholesky: Tensor

    def __getstate__(self) -> dict[str, Any]:
        return _without_cached(self)

    @cached_property
    def inverse(self) -> Tensor:
        """The inverse of `cholesky`. # (cells, B, d, d)"""
        eye = torch.eye(self.bucket.size, dtype=self.T.dtype, device=self.T.device)
        return torch.linalg.solve_triangular(
            self.cholesky, eye.expand_as(self.cholesky), upper=False
        )

    @cached_property
    def spreading(self) -> Tensor:
        """K = cholesky⁻¹ Tᵀ, so that the covariance of h is KᵀK. # (cells, B, d, d)"""
        return self.inverse @ self.T.mT

    def solve(self, gradient: Tensor) -> Tensor:
        """Λ⁻¹ g of flat vectors. # (cells, B * d)"""
        g = gradient[:, self.bucket.vector].reshape(-1, self.bucket.count, self.bucket.size, 1)
        half = torch.linalg.solve_triangular(self.cholesky, g, upper=False)
        return torch.linalg.solve_triangular(self.cholesky.mT, half, upper=True).flatten(1)

    def spread_out(self, epsilon: Tensor) -> Tensor:
        """T ε of flat vectors. # (cells, B * d)"""
        e = epsilon[:, self.bucket.vector].reshape(-1, self.bucket.count, self.bucket.size, 1)
        return (self.T @ e).flatten(1)

    def gather_in(self, gradient: Tensor) -> Tensor:
        """Tᵀ g of flat vectors. # (cells, B * d)"""
        g = gradient[:, self.bucket.vector].reshape(-1, self.bucket.count, self.bucket.size, 1)
        return (self.T.mT @ g).flatten(1)


@dataclass(frozen=True, eq=False)
class GaussianSolution:
    """The posterior of the unknowns of a linear-Gaussian component.

    Latents are named by the number of their site. Everything is float64. Covariances are kept from
    their first use: take them with gradients on if they are to be differentiated.

    Attributes:
        layout: Blocks and places.
        log_evidence: Nats of each block. # (cells, blocks)
        constant: Nats of the observed rows that read no latent. # (cells,)
        degenerate: Whether an observed entry that counts has no spread: nothing here is valid then.
    """

    layout: BlockLayout
    log_evidence: Tensor
    constant: Tensor
    degenerate: bool
    _rows: tuple[_Rows, ...]
    _factors: tuple[_Factor, ...]
    _centre: tuple[Tensor | None, ...]  # c of each latent. (·, n, q)
    _epsilon: Tensor  # the mode m, flat
    _delta: Tensor  # T m, flat
    _residuals: tuple[
        Tensor | None, ...
    ]  # of observed sites at the posterior mean. (cells, rows, D)

    def __getstate__(self) -> dict[str, Any]:
        return _without_cached(self)

    @property
    def cells(self) -> int:
        """Combinations of discrete values."""
        return int(self.log_evidence.shape[0])

    def constant_rows(self, site: int) -> Tensor:
        """Log density of observed rows that read no latent, 0 for all others. # (cells, rows)"""
        residual = self._residuals[site]
        alone = self.layout.block_of_row[site] < 0
        if residual is None:
            return self._delta.new_zeros(self.cells, len(alone))
        density = self._rows[site].log_density(residual)
        return torch.where(alone, density, torch.zeros_like(density)).expand(self.cells, -1)

    def mean(self, latent: int) -> Tensor:
        """Posterior mean. # (cells, n, q)"""
        own, centre = self._latent(latent)
        return centre + self._delta[:, own.vector]

    def covariance_of(
        self, latent_a: int, elements_a: Tensor, latent_b: int, elements_b: Tensor
    ) -> Tensor:
        """Posterior covariance of pairs of elements; zero between blocks. # (cells, m, q_a, q_b)

        Args:
            latent_a: The number of the first latent's site.
            elements_a: An element of it for each pair. # (m,)
            latent_b: The number of the other's.
            elements_b: # (m,)
        """
        a, b = self._latent(latent_a)[0], self._latent(latent_b)[0]
        blocks = self.layout.block_of_row
        same = (blocks[latent_a][elements_a] == blocks[latent_b][elements_b])[:, None, None]
        places = a.row[elements_a].unsqueeze(-1) + b.column[elements_b].unsqueeze(-2)
        found = self._covariance[:, torch.where(same, places, torch.zeros_like(places))]
        return torch.where(same, found, torch.zeros_like(found))

    def moments(self, site: int) -> tuple[Tensor, Tensor]:
        """Joint posterior moments of what the rows of a site read: terms in order, a latent last.

        Returns:
            The mean and the covariance; zero where a row reads nothing.
            # (cells, rows, Q), (cells, rows, Q, Q)
        """
        reading = self.layout.reads[site]
        mean = self._mean_read(site)
        own = self.layout.own[site]
        if own is not None:
            reading = reading.beside(own)
            mean = torch.cat([mean, self.mean(site)], -1)
        return mean, _pairs(self._covariance, reading, reading)

    def coefficients(self, site: int) -> Tensor:
        """(C, b), of which the mean of a site is made; zero where a row reads nothing.

        Returns:
            # (cells|1, rows|1, D, Q + 1)
        """
        rows = self._rows[site]
        return _beside([rows.coefficients, rows.offset.unsqueeze(-1)], rows.offset, 0)

    def residual_at(self, site: int, read: Tensor, own: Tensor | None = None) -> Tensor:
        """y − b − C u at some values; zero at observed entries of weight zero.

        Args:
            site: The number of the site.
            read: u, what its mean reads. # (cells|1, rows, Q)
            own: y of a latent. # (rows, D)

        Returns:
            # (cells|1, rows, D)
        """
        rows = self._rows[site]
        y = rows.value if own is None else own
        assert y is not None
        r = y - rows.offset - _apply(rows.coefficients, read)
        return r if rows.weight is None else torch.where(rows.weight > 0, r, torch.zeros_like(r))

    def read_of(self, site: int, values: Mapping[int, Tensor]) -> Tensor:
        """What the rows of a site read of values of all latents; zero where they read nothing.

        Args:
            site: The number of the site.
            values: Of each latent. # (n, q) each

        Returns:
            # (rows, Q)
        """
        form = self.layout.sites[site]
        parts = [self._delta.new_zeros(form.rows, 0)]
        for term in form.terms:
            part = values[term.latent][term.elements.clamp(min=0)]
            there = (term.elements >= 0).unsqueeze(-1)
            parts.append(torch.where(there, part, torch.zeros_like(part)))
        return torch.cat(parts, -1)

    def read_covariance(self, site: int, covariances: Mapping[int, Tensor]) -> Tensor:
        """The covariance of what the rows of a site read, where elements are independent.

        Args:
            site: The number of the site.
            covariances: Of each element of each latent. # (n, q, q) each

        Returns:
            # (rows, Q, Q)
        """
        form = self.layout.sites[site]
        blocks = []
        for a in form.terms:
            row = []
            for b in form.terms:
                if a.latent == b.latent:
                    same = (a.elements == b.elements) & (a.elements >= 0)
                    part = covariances[a.latent][a.elements.clamp(min=0)]
                    row.append(torch.where(same[:, None, None], part, torch.zeros_like(part)))
                else:
                    shape = covariances[a.latent].shape[-1], covariances[b.latent].shape[-1]
                    row.append(self._delta.new_zeros(form.rows, *shape))
            blocks.append(torch.cat(row, -1))
        return torch.cat(blocks, -2) if blocks else self._delta.new_zeros(form.rows, 0, 0)

    def is_of(self, other: Integrated) -> bool:
        """Whether it is the posterior of the very numbers of another one, site by site."""
        if self is other or not isinstance(other, GaussianSolution):
            return self is other
        return len(self._rows) == len(other._rows) and all(map(_are_equal, self._rows, other._rows))

    def residual_moments(self, site: int, diagonal: bool = False) -> tuple[Tensor, Tensor]:
        """Moments of the residuals y − offset − Σ C h; zero at observed entries of weight zero.

        Args:
            site: The number of the site.
            diagonal: Whether of the second moment only the diagonal is wanted.

        Returns:
            The mean and the second moment about zero.
            # (cells, rows, D), (cells, rows, D, D) or (cells, rows, D)
        """
        rows, own, residual = self._rows[site], self.layout.own[site], self._residuals[site]
        if residual is None:  # the residuals of a latent are its own noises, L ε
            assert own is not None
            L = rows.spread if rows.is_matrix else rows.spread.diag_embed()
            mean = _apply(L, self._epsilon[:, own.vector])
            covariance = L @ _pairs(self._noise, own, own) @ L.mT
        else:
            reading = self.layout.reads[site]
            C = self.counted_coefficients(site)
            mean = residual
            if diagonal:
                spread = C @ _pairs(self._covariance, reading, reading)
                return mean, (spread * C).sum(-1).expand(mean.shape) + mean.square()
            covariance = C @ _pairs(self._covariance, reading, reading) @ C.mT
        if diagonal:
            return mean, covariance.diagonal(dim1=-2, dim2=-1) + mean.square()
        return mean, covariance + mean.unsqueeze(-1) * mean.unsqueeze(-2)

    def linear_moments(self, site: int, diagonal: bool = False) -> LinearMoments:
        """Moments of the residuals and of φ = (unknowns that the mean reads, 1), for the M-step.

        Args:
            site: The number of the site.
            diagonal: Whether of E[r rᵀ] only the diagonal is wanted.
        """
        reading, own, rows = self.layout.reads[site], self.layout.own[site], self._rows[site]
        covariance = _pairs(self._covariance, reading, reading)
        if own is None:
            cross = -(self.counted_coefficients(site) @ covariance)
        else:
            L = rows.spread if rows.is_matrix else rows.spread.diag_embed()
            cross = L @ _pairs(self._noise_and_latents, own, reading)
        residual, second = self.residual_moments(site, diagonal)
        mean = self._mean_read(site)
        return linear_moments(mean, covariance, residual, cross, second, diagonal)

    def sample(self, n: int, generator: torch.Generator | None = None) -> list[Tensor]:
        """Joint posterior draws of all latents. # (n, cells, elements, q) each, in the order of sites

        Args:
            n: Number of draws.
            generator: The source of randomness; by default torch's.
        """
        delta = []
        for factor in self._factors:
            shape = (*factor.cholesky.shape[:-1], n)
            z = torch.randn(
                shape, generator=generator, dtype=self._delta.dtype, device=self._delta.device
            )
            delta.append((factor.spreading.mT @ z).flatten(1, 2).movedim(-1, 0))
        flat = self._delta + (torch.cat(delta, -1) if delta else 0)
        return [
            self._latent(s)[1] + flat[:, :, own.vector]
            for s, own in enumerate(self.layout.own)
            if own is not None
        ]

    def prior_draw(self, generator: torch.Generator) -> dict[int, Tensor]:
        """One draw of all latents from their prior, by the number of the site. # (cells, n, q) each

        Args:
            generator: The source of randomness, on the CPU.
        """
        parts = []
        for factor in self._factors:
            shape = (*factor.T.shape[:-1], 1)
            z = torch.randn(shape, generator=generator, dtype=torch.float64)
            parts.append((factor.T @ z.to(factor.T.device)).reshape(self.cells, -1))
        flat = torch.cat(parts, 1)
        return {
            s: self._latent(s)[1] + flat[:, own.vector]
            for s, own in enumerate(self.layout.own)
            if own is not None
        }

    def seeing(self, kept: Mapping[int, Tensor]) -> GaussianSolution:
        """The posterior given some of the data only: the weights of all others are zero.

        Args:
            kept: By the number of an observed site which of its rows are seen; all rows of a site that
                is not named. # (rows,) each
        """
        numbers = []
        for s, (form, rows) in enumerate(zip(self.layout.sites, self._rows, strict=True)):
            widths = [self.layout.sites[term.latent].width for term in form.terms]
            weight = rows.weight
            if s in kept:
                seen = kept[s].to(rows.offset).expand(form.rows).unsqueeze(-1)
                weight = seen if weight is None else weight * seen
            parts = rows.coefficients.split(widths, -1) if widths else ()
            numbers.append(
                SiteNumbers(rows.value, rows.offset, rows.spread, parts, rows.is_matrix, weight)
            )
        return solve(self.layout, numbers)

    def noise(self, site: int) -> Tensor:
        """The covariance of a site given all latents; that of entries of weight zero is of no use.

        Returns:
            # (cells|1, rows|1, D, D)
        """
        rows = self._rows[site]
        spread = rows.spread
        return spread @ spread.mT if rows.is_matrix else spread.square().diag_embed()

    def read_of_draws(self, site: int, drawn: Sequence[Tensor]) -> Tensor:
        """What the rows of a site read of draws of all latents.

        Args:
            site: The number of the site.
            drawn: As `sample` gives them. # (n, cells, elements, q) each

        Returns:
            # (n, cells, rows, Q)
        """
        latents = [s for s, form in enumerate(self.layout.sites) if form.is_latent]
        of_latent = dict(zip(latents, drawn, strict=True))
        form = self.layout.sites[site]
        n = drawn[0].shape[0] if drawn else 1
        parts = [self._delta.new_zeros(n, self.cells, form.rows, 0)]
        for term in form.terms:
            read = of_latent[term.latent][:, :, term.elements.clamp(min=0)]
            there = (term.elements >= 0).unsqueeze(-1)
            parts.append(torch.where(there, read, torch.zeros_like(read)))
        return torch.cat(parts, -1)

    def entropy(self) -> Tensor:
        """Entropy of the posterior of each block, −inf at a variance of zero. # (cells, blocks)"""
        layout = self.layout
        sizes = layout.block_sizes.to(torch.float64)
        out = 0.5 * (1 + _LOG_TWO_PI) * sizes - 0.5 * _log_determinants(self._factors)
        for s, form in enumerate(layout.sites):
            if form.is_latent:
                each = self._rows[s].deviations.log().sum(-1).expand(self.cells, form.rows)
                out = _added(out, layout.block_of_row[s], each)
        return out

    def _latent(self, site: int) -> tuple[Reading, Tensor]:
        own, centre = self.layout.own[site], self._centre[site]
        if own is None or centre is None:
            raise ValueError(f"{self.layout.sites[site].name!r} is observed: it is no unknown.")
        return own, centre

    def _mean_read(self, site: int) -> Tensor:
        """Posterior mean of what the mean of a site reads. # (cells, rows, Q)"""
        reading = self.layout.reads[site]
        centre = _read_centres(self.layout, site, self._centre)
        return centre + _at(self._delta, reading)

    def counted_coefficients(self, site: int) -> Tensor:
        """C, zero at entries of weight zero. # (·, ·, D, Q)"""
        rows = self._rows[site]
        if rows.weight is None:
            return rows.coefficients
        return rows.coefficients * (rows.weight > 0).unsqueeze(-1)

    @cached_property
    def _covariance(self) -> Tensor:
        """Cov(h), the flat matrices. # (cells, matrix_size)"""
        return self._matrices([f.spreading.mT @ f.spreading for f in self._factors])

    @cached_property
    def _noise(self) -> Tensor:
        """Cov(ε), the flat matrices. # (cells, matrix_size)"""
        return self._matrices([f.inverse.mT @ f.inverse for f in self._factors])

    @cached_property
    def _noise_and_latents(self) -> Tensor:
        """Cov(ε, h), the flat matrices. # (cells, matrix_size)"""
        return self._matrices([f.inverse.mT @ f.spreading for f in self._factors])

    def _matrices(self, batches: list[Tensor]) -> Tensor:
        if not batches:
            return self._delta.new_zeros(self.cells, 0)
        return torch.cat([batch.flatten(1) for batch in batches], 1)


def _without_cached(value: _Factor | GaussianSolution) -> dict[str, Any]:
    """What a copy begins with: the rest follows from it."""
    return {f.name: getattr(value, f.name) for f in fields(value)}


def solve(layout: BlockLayout, numbers: Sequence[SiteNumbers]) -> GaussianSolution:
    """Evidence and posterior of a linear-Gaussian component.

    Args:
        layout: Its blocks.
        numbers: The numbers of each of its sites.

    Raises:
        ValueError: If the numbers of a site do not fit its form.

    Example:
        >>> from pyro_em.posteriors.gaussian_layout import SiteForm, Term
        >>> term = Term(0, torch.zeros(2, dtype=torch.long))
        >>> sites = SiteForm("mean", 1, 1, is_latent=True), SiteForm("x", 2, 1, False, (term,))
        >>> one = torch.ones(1, 1, 1)
        >>> x = torch.tensor([[2.0], [4.0]])
        >>> data = SiteNumbers(x, 0 * one, one, (one[..., None],))
        >>> solution = solve(BlockLayout.of(sites), [SiteNumbers(None, 0 * one, one), data])
        >>> solution.mean(0).item()  # 6 / (1 + 2)
        2.0
    """
    rows = tuple(_prepared(layout, s, numbers[s]) for s in range(len(layout.sites)))
    cells = max((x.shape[0] for r in rows for x in (r.coefficients, r.spread, r.offset)), default=1)
    centre: list[Tensor | None] = []
    residual: list[Tensor | None] = []  # of observed sites at ε = 0
    for s, site in enumerate(rows):
        read = _apply(site.coefficients, _read_centres(layout, s, centre), layout.sites[s].rows)
        centre.append(site.offset + read if site.value is None else None)
        residual.append(None if site.value is None else (site.value - site.offset) - read)

    precision = _precision(layout, rows, cells)
    factors = []
    for bucket in layout.buckets:
        T = _substituted(layout, bucket, rows, cells)
        M = precision[:, bucket.matrix].reshape(-1, bucket.count, bucket.size, bucket.size)
        cholesky = _factorized(layout, bucket, rows, T, M)
        factors.append(_Factor(bucket, T, cholesky))

    epsilon = precision.new_zeros(cells, layout.vector_size)
    delta = epsilon
    for step in range(_STEPS if factors else 0):  # the mode, and refinements of it
        gradient = _gradient(layout, rows, residual, delta)
        gradient = torch.cat([f.gather_in(gradient) for f in factors], 1) - epsilon
        move = torch.cat([f.solve(gradient) for f in factors], 1)
        epsilon = epsilon + move
        delta = torch.cat([f.spread_out(epsilon) for f in factors], 1)
        # Half of gᵀ Λ⁻¹ g is what the evidence was short of before this move.
        if step > 0 and not bool((gradient * move).sum(-1).max() > _SHORT):
            break

    log_evidence = -0.5 * _log_determinants(factors) if factors else delta.new_zeros(cells, 0)
    if factors:
        log_evidence = log_evidence - 0.5 * torch.cat([_squares(f, epsilon) for f in factors], 1)
    constant = delta.new_zeros(cells)
    at_mode: list[Tensor | None] = []
    for s, site in enumerate(rows):
        start = residual[s]
        if start is None:
            at_mode.append(None)
            continue
        r = (start - _apply(site.coefficients, _at(delta, layout.reads[s]))).expand(cells, -1, -1)
        density = site.log_density(r)
        block = layout.block_of_row[s]
        alone = block < 0
        if bool(alone.any()):
            constant = constant + torch.where(alone, density, torch.zeros_like(density)).sum(1)
            log_evidence = _added(log_evidence, block[~alone], density[:, ~alone])
        else:
            log_evidence = _added(log_evidence, block, density)
        if site.weight is not None:
            r = torch.where(site.weight > 0, r, torch.zeros_like(r))
        at_mode.append(r)
    return GaussianSolution(
        layout,
        log_evidence,
        constant,
        any(site.degenerate for site in rows),
        rows,
        tuple(factors),
        tuple(centre),
        epsilon,
        delta,
        tuple(at_mode),
    )


def _are_equal(a: _Rows, b: _Rows) -> bool:
    """Whether all numbers of two sites are the same."""
    pairs = (
        (a.coefficients, b.coefficients),
        (a.spread, b.spread),
        (a.value, b.value),
        (a.offset, b.offset),
        (a.weight, b.weight),
    )
    return all(x is y or (x is not None and y is not None and torch.equal(x, y)) for x, y in pairs)


def _prepared(layout: BlockLayout, s: int, numbers: SiteNumbers) -> _Rows:
    form, reading = layout.sites[s], layout.reads[s]
    if (numbers.value is None) != form.is_latent:
        raise ValueError(f"{form.name!r} must have a value if and only if it is observed.")
    if len(numbers.coefficients) != len(form.terms):
        raise ValueError(
            f"{form.name!r} has {len(form.terms)} terms, but {len(numbers.coefficients)} coefficients."
        )
    if form.is_latent and numbers.weight is not None:
        raise ValueError(f"{form.name!r} is a latent: only observed sites can be weighted.")
    offset, spread = numbers.offset.double(), numbers.spread.double()
    coefficients = _beside([c.double() for c in numbers.coefficients], offset, form.width)
    if reading.present is not None:
        there = reading.present.unsqueeze(-2)
        coefficients = torch.where(there, coefficients, torch.zeros_like(coefficients))
    value, weight = numbers.value, numbers.weight
    if value is None:
        return _Rows(coefficients, spread, numbers.is_matrix, None, offset, None, False)

    value = value.double()
    if weight is not None:
        weight = weight.double()
        if numbers.is_matrix and weight.shape[-1] != 1 and not numbers.is_apart:
            raise ValueError(f"{form.name!r} has a full covariance: weights must be of whole rows.")
        missing = weight == 0
        value = torch.where(missing, torch.zeros_like(value), value)
        if spread.shape[1] == 1:  # one spread for all rows counts if any of them does
            missing = missing.all(0, keepdim=True)
        if numbers.is_matrix:
            eye = torch.eye(form.width, dtype=spread.dtype, device=spread.device)
            whole = missing.all(-1, keepdim=True) if numbers.is_apart else missing
            spread = torch.where(whole.unsqueeze(-1), eye, spread)
        else:
            spread = torch.where(missing, torch.ones_like(spread), spread)
    diagonal = spread.diagonal(dim1=-2, dim2=-1) if numbers.is_matrix else spread
    degenerate = bool((diagonal == 0).any())
    return _Rows(coefficients, spread, numbers.is_matrix, value, offset, weight, degenerate)


def _beside(coefficients: list[Tensor], like: Tensor, width: int) -> Tensor:
    """The coefficients of all terms in one matrix. # (·, ·, D, Q)"""
    if not coefficients:
        return like.new_zeros(1, 1, width, 0)
    if len(coefficients) == 1:
        return coefficients[0]
    lead = torch.broadcast_shapes(*(c.shape[:2] for c in coefficients))
    return torch.cat([c.expand(*lead, *c.shape[2:]) for c in coefficients], -1)


def _apply(C: Tensor, u: Tensor, rows: int | None = None) -> Tensor:
    """C u of each row. # (·, rows, D)"""
    if C.shape[-1] == 0:
        return u.new_zeros(1, u.shape[1] if rows is None else rows, C.shape[-2])
    if C.shape[1] == 1:
        return u @ C[:, 0].mT
    if min(C.shape[-2:]) == 1:
        return (C * u.unsqueeze(-2)).sum(-1)
    return (C @ u.unsqueeze(-1)).squeeze(-1)


def _at(flat: Tensor, reading: Reading) -> Tensor:
    """What rows read of a flat vector. # (cells, rows, Q)"""
    out = flat[:, reading.vector]
    if reading.present is None:
        return out
    return torch.where(reading.present, out, torch.zeros_like(out))


def _pairs(flat: Tensor, a: Reading, b: Reading) -> Tensor:
    """What rows read of the flat matrices. # (cells, rows, Q_a, Q_b)"""
    out = flat[:, a.row.unsqueeze(-1) + b.column.unsqueeze(-2)]
    if a.present is not None:
        out = torch.where(a.present.unsqueeze(-1), out, torch.zeros_like(out))
    if b.present is not None:
        out = torch.where(b.present.unsqueeze(-2), out, torch.zeros_like(out))
    return out


def _read_centres(layout: BlockLayout, site: int, centre: Sequence[Tensor | None]) -> Tensor:
    """The prior means of what the mean of a site reads. # (·, rows, Q)"""
    form, reading = layout.sites[site], layout.reads[site]
    out = []
    for term in form.terms:
        prior = centre[term.latent]
        assert prior is not None
        read = prior[:, term.elements.clamp(min=0)]
        out.append(read)
    if not out:
        device = layout.device
        return torch.zeros(1, form.rows, 0, dtype=torch.float64, device=device)
    cells = max(x.shape[0] for x in out)
    read = torch.cat([x.expand(cells, -1, -1) for x in out], -1)
    if reading.present is None:
        return read
    return torch.where(reading.present, read, torch.zeros_like(read))


def _added(target: Tensor, places: Tensor, x: Tensor) -> Tensor:
    """The target with x added at places along its last dimension, the same for each cell.

    One flat index_add for all cells: along a dimension it goes number by number.
    """
    cells, size = target.shape
    x = x.expand(cells, *x.shape[1:]).reshape(-1)
    places = places.reshape(1, -1)
    if cells > 1:
        places = torch.arange(cells, device=places.device).unsqueeze(-1) * size + places
    return target.reshape(-1).index_add(0, places.reshape(-1), x).reshape(cells, size)


def _precision(layout: BlockLayout, rows: Sequence[_Rows], cells: int) -> Tensor:
    """M = Σ Cᵀ P C of observed rows, the flat matrices. # (cells|1, matrix_size)"""
    total = torch.zeros(1, layout.matrix_size, dtype=torch.float64, device=layout.device)
    for k in sorted({1, cells}):  # what all cells share is added once
        places, terms, size = [], [], 0  # what many small sites add goes at once
        for s, site in enumerate(rows):
            reading = layout.reads[s]
            if site.value is None or reading.size == 0 or site.whitened.shape[0] != k:
                continue
            W, n = site.whitened, layout.sites[s].rows
            each = k * reading.size**2
            step = max(1, _MANY // each)
            if torch.is_grad_enabled() and W.requires_grad:
                step = max(1, n)
            for begin in range(0, n, step):
                chunk = slice(begin, min(begin + step, n))
                places.append(reading.pairs(chunk).reshape(-1))
                terms.append(_gram(site, chunk).reshape(k, -1))
                size += each * (chunk.stop - begin)
                if size >= _MANY:
                    total = _added(total.expand(k, -1), torch.cat(places), torch.cat(terms, 1))
                    places, terms, size = [], [], 0
        if places:
            total = _added(total.expand(k, -1), torch.cat(places), torch.cat(terms, 1))
    return total


def _gram(site: _Rows, rows: slice) -> Tensor:
    """Cᵀ P C of each row. # (cells|1, rows, Q, Q)"""
    W = site.whitened if site.whitened.shape[1] == 1 else site.whitened[:, rows]
    weighted = W
    if site.weight is not None:
        weight = site.weight if site.weight.shape[0] == 1 else site.weight[rows]
        weighted = W * weight.unsqueeze(-1)
    gram = W.mT * weighted if W.shape[-2] == 1 else W.mT @ weighted
    return gram.expand(-1, rows.stop - rows.start, -1, -1)


def _gradient(
    layout: BlockLayout, rows: Sequence[_Rows], residual: Sequence[Tensor | None], delta: Tensor
) -> Tensor:
    """Σ Cᵀ P r at h = c + δ, a flat vector. # (cells, vector_size)"""
    out = torch.zeros_like(delta)
    for s, site in enumerate(rows):
        start, reading = residual[s], layout.reads[s]
        if start is None or reading.size == 0:
            continue
        r = start - _apply(site.coefficients, _at(delta, reading))
        out = _added(out, reading.vector, _apply(site.whitened.mT, site.weigh(site.whiten(r))))
    return out


def _substituted(layout: BlockLayout, bucket: Bucket, rows: Sequence[_Rows], cells: int) -> Tensor:
    """T of the blocks of a bucket, from parents to children; zero in the padding. # (cells, B, d, d)"""
    of_latent: dict[int, Tensor] = {}  # rows of T. (·, n, q, d)
    for member in bucket.members:
        form, site = layout.sites[member.site], rows[member.site]
        n, q = len(member.positions), form.width
        L = site.spread if site.is_matrix else site.spread.diag_embed()
        L = _of_members(L, member.elements).expand(-1, n, -1, -1)
        places = member.positions[:, None, None] + torch.arange(q, device=layout.device)
        T = L.new_zeros(L.shape[0], n, q, bucket.size)
        T = T.scatter(-1, places.expand(L.shape[0], n, q, q), L)
        begin = 0
        for term, parents in zip(form.terms, member.parents, strict=True):
            end = begin + layout.sites[term.latent].width
            if parents is not None:
                C = _of_members(site.coefficients[..., begin:end], member.elements)
                T = T + C @ of_latent[term.latent][:, parents]
            begin = end
        of_latent[member.site] = T
    stacked = [T.expand(cells, -1, -1, -1).flatten(1, 2) for T in of_latent.values()]
    stacked.append(stacked[0].new_zeros(cells, 1, bucket.size))  # what padding takes
    shape = cells, bucket.count, bucket.size, bucket.size
    return torch.cat(stacked, 1).index_select(1, bucket.order).reshape(shape)


def _factorized(
    layout: BlockLayout, bucket: Bucket, rows: Sequence[_Rows], T: Tensor, M: Tensor
) -> Tensor:
    """The lower factor of Λ = I + Tᵀ M T, from the rows themselves where that would lose digits.

    What rounding does to log|Λ| is about the size of the terms of Λ_ii relative to the pivots.
    """
    eye = torch.eye(bucket.size, dtype=T.dtype, device=T.device)
    information = eye + T.mT @ M @ T
    cholesky, failed = torch.linalg.cholesky_ex(information)
    with torch.no_grad():
        reach = M.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt().unsqueeze(-2) @ T.abs()
        pivots = cholesky.diagonal(dim1=-2, dim2=-1).square()
        lost = _EPSILON * ((1 + reach.squeeze(-2).square()) / pivots).amax(-1)
        finite = information.isfinite().flatten(2).all(-1)
        poor = ((lost > _LOSS) | (failed != 0)) & finite
        which = poor.any(0).nonzero().squeeze(-1)
        exact = _from_rows(layout, bucket, rows, T, which) if len(which) else None
        if exact is None:
            wrong = (failed != 0)[..., None, None]
    if exact is None:  # numbers that are not finite: the answer says so, without an error
        return torch.where(wrong, torch.full_like(cholesky, math.nan), cholesky)

    if information.requires_grad:
        # Its derivatives are those of the factor of L⁻¹ Λ L⁻ᵀ, which is the identity here.
        moved = information[:, which] - information[:, which].detach()
        half = torch.linalg.solve_triangular(exact, moved, upper=False)
        moved = torch.linalg.solve_triangular(exact, half.mT, upper=False)
        exact = exact @ torch.linalg.cholesky_ex(eye + moved).L
        replaced = torch.zeros_like(poor[0])
        replaced[which] = True
        safe = torch.where(replaced[:, None, None], eye, information)
        cholesky, failed = torch.linalg.cholesky_ex(safe)
    cholesky = torch.where(
        (failed != 0)[..., None, None] & ~finite[..., None, None], math.nan, cholesky
    )
    return cholesky.index_copy(1, which, exact)


def _from_rows(
    layout: BlockLayout, bucket: Bucket, rows: Sequence[_Rows], T: Tensor, which: Tensor
) -> Tensor | None:
    """The factors of some blocks of a bucket by QR; None if the rows are too many.

    Returns:
        # (cells, n, d, d)
    """
    cells, B, d = T.shape[:3]
    number = torch.full((layout.blocks,), -1, device=T.device)
    number[bucket.first + which] = torch.arange(len(which), device=T.device)
    chosen = []
    for s, site in enumerate(rows):
        block, reading = layout.block_of_row[s], layout.reads[s]
        if site.value is not None and reading.size:
            inside = number[block.clamp(min=0)]
            chosen.append(
                (site, reading, ((block >= 0) & (inside >= 0)).nonzero().squeeze(-1), inside)
            )
    sizes = [len(r) * max(site.coefficients.shape[-2:]) for site, _, r, _ in chosen]
    if cells * sum(sizes) * d > _MOST:
        return None
    flat_T = T.reshape(cells, B * d, d)
    out, blocks = [T.new_zeros(cells, 0, d)], [which[:0]]
    for site, reading, r, inside in chosen:
        W = site.whitened
        W = (W if W.shape[1] == 1 else W[:, r]).expand(-1, len(r), -1, -1)
        if site.weight is not None:
            weight = site.weight if site.weight.shape[0] == 1 else site.weight[r]
            W = W * weight.sqrt().unsqueeze(-1)
        # A missing read takes any row: its coefficients are zero.
        places = (reading.vector[r] - bucket.vector.start).clamp(0, B * d - 1)
        out.append((W @ flat_T[:, places]).flatten(1, 2))
        blocks.append(inside[r].repeat_interleave(W.shape[-2]))
    return square_root(torch.cat(out, 1), torch.cat(blocks), len(which))


def _of_members(x: Tensor, elements: Tensor | None) -> Tensor:
    """The rows of some elements; what all rows share as it is. # (·, n|1, ...)"""
    return x if elements is None or x.shape[1] == 1 else x[:, elements]


def _log_determinants(factors: Sequence[_Factor]) -> Tensor:
    """log|Λ| of each block. # (cells, blocks)"""
    logs = [2 * f.cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1) for f in factors]
    return torch.cat(logs, 1)


def _squares(factor: _Factor, epsilon: Tensor) -> Tensor:
    """‖ε‖² of each block. # (cells, B)"""
    bucket = factor.bucket
    return epsilon[:, bucket.vector].reshape(-1, bucket.count, bucket.size).square().sum(-1)
