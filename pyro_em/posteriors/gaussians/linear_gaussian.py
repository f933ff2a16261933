"""Evidence and posterior of the continuous latents of a linear-Gaussian component.

How a posterior is found and all that it answers are one subject here, since the posterior given some
of the data is found again by the same numbers. For sites as in `gaussian_layout`, all unknowns h are
written in their own noises ε ~ N(0, I):

    h = c + T ε,     Λ = I + Tᵀ M T,     M = Σ_rows Cᵀ P C,     P = (L Lᵀ)⁻¹ of observed rows,

T by substitution in topological order. No prior is inverted: variances of zero are fine. The posterior
of ε is N(m, Λ⁻¹). The evidence is taken at the mode m, which is refined until it stays,

    log p(x) = log p(x, m) + ½ d log 2π − ½ log|Λ|.

A mode that is off by δ costs δᵀΛδ/2 there: sums of large squares, whose difference would be the
answer, never meet. Where |Λ| itself would be lost to rounding, it is taken from the rows by a QR
decomposition. All is done in float64, and can be differentiated twice.

The matrices come about in `block_factors`, from the numbers of sites in `site_rows`; what rows read of
the unknowns is gathered in `flat_reads`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_em.posteriors.gaussians.block_factors import gradient_of, without_cached
from pyro_em.posteriors.gaussians.block_places import Reading
from pyro_em.posteriors.gaussians.flat_reads import (
    added,
    pairs_at,
    read_at,
    read_centres,
    read_covariances,
    read_values,
)
from pyro_em.posteriors.gaussians.gaussian_layout import BlockLayout
from pyro_em.posteriors.gaussians.joint_factor import JointFactor, joint_factor
from pyro_em.posteriors.gaussians.site_rows import (
    LOG_TWO_PI,
    SiteNumbers,
    SiteRows,
    applied,
    are_equal,
    beside,
    rows_of_site,
)
from pyro_em.updates.expectations.linear_moments import LinearMoments, linear_moments

_STEPS = 6  # moves to the mode at most: the first, and mostly one refinement

_SHORT = 1e-10  # nats; one more move makes far less of it


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
    _rows: tuple[SiteRows, ...]
    _factor: JointFactor
    _centre: tuple[Tensor | None, ...]  # c of each latent. (·, n, q)
    _epsilon: Tensor  # the mode m, flat
    _delta: Tensor  # T m, flat
    # Of observed sites at the posterior mean. (cells, rows, D)
    _residuals: tuple[Tensor | None, ...]

    def __getstate__(self) -> dict[str, Any]:
        return without_cached(self)

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
        blocks, leaves = self.layout.block_of_row, self.layout.leaf_of_row
        same = blocks[latent_a][elements_a] == blocks[latent_b][elements_b]
        known = same  # where one matrix holds both
        if leaves:
            known = same & (leaves[latent_a][elements_a] == leaves[latent_b][elements_b])
        known, same = known[:, None, None], same & ~known
        places = a.row[elements_a].unsqueeze(-1) + b.column[elements_b].unsqueeze(-2)
        found = self._factor.covariance[:, torch.where(known, places, torch.zeros_like(places))]
        found = torch.where(known, found, torch.zeros_like(found))
        if bool(same.any()):
            which = same.nonzero().squeeze(-1)
            pairs = (latent_a, elements_a[which]), (latent_b, elements_b[which])
            found = found.index_copy(1, which, self._factor.covariance_of(*pairs))
        return found

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
        return mean, pairs_at(self._factor.covariance, reading, reading)

    def coefficients(self, site: int) -> Tensor:
        """(C, b), of which the mean of a site is made; zero where a row reads nothing.

        Returns:
            # (cells|1, rows|1, D, Q + 1)
        """
        rows = self._rows[site]
        return beside([rows.coefficients, rows.offset.unsqueeze(-1)], rows.offset, 0)

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
        r = y - rows.offset - applied(rows.coefficients, read)
        return r if rows.weight is None else torch.where(rows.weight > 0, r, torch.zeros_like(r))

    def read_of(self, site: int, values: Mapping[int, Tensor]) -> Tensor:
        """What the rows of a site read of values of all latents; zero where they read nothing.

        Args:
            site: The number of the site.
            values: Of each latent. # (n, q) each

        Returns:
            # (rows, Q)
        """
        none = self._delta.new_zeros(self.layout.sites[site].rows, 0)
        return read_values(self.layout, site, values, none)

    def read_covariance(self, site: int, covariances: Mapping[int, Tensor]) -> Tensor:
        """The covariance of what the rows of a site read, where elements are independent.

        Args:
            site: The number of the site.
            covariances: Of each element of each latent. # (n, q, q) each

        Returns:
            # (rows, Q, Q)
        """
        return read_covariances(self.layout, site, covariances, self._delta)

    def is_of(self, other: object) -> bool:
        """Whether it is the posterior of the very numbers of another one, site by site."""
        if self is other or not isinstance(other, GaussianSolution):
            return self is other
        return len(self._rows) == len(other._rows) and all(map(are_equal, self._rows, other._rows))

    def residuals(self, site: int) -> Tensor:
        """y − offset − Σ C h at the posterior mean, of a latent L ε; zero at weight zero.

        Args:
            site: The number of the site.

        Returns:
            # (cells, rows, D)
        """
        rows, own, residual = self._rows[site], self.layout.own[site], self._residuals[site]
        if residual is not None:
            return residual
        assert own is not None
        L = rows.spread if rows.is_matrix else rows.spread.diag_embed()
        return applied(L, self._epsilon[:, own.vector])

    def residual_moments(self, site: int, diagonal: bool = False) -> tuple[Tensor, Tensor]:
        """Moments of the residuals y − offset − Σ C h; zero at observed entries of weight zero.

        Args:
            site: The number of the site.
            diagonal: Whether of the second moment only the diagonal is wanted.

        Returns:
            The mean and the second moment about zero.
            # (cells, rows, D), (cells, rows, D, D) or (cells, rows, D)
        """
        moved = None
        if self._residuals[site] is not None:
            reading = self.layout.reads[site]
            covariance = pairs_at(self._factor.covariance, reading, reading)
            moved = self.counted_coefficients(site) @ covariance
        return self._residual_moments(site, diagonal, moved)

    def _residual_moments(
        self, site: int, diagonal: bool, moved: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The same with C Cov(u) of an observed site. # (cells, rows, D, Q)"""
        rows, own, residual = self._rows[site], self.layout.own[site], self._residuals[site]
        if residual is None:  # the residuals of a latent are its own noises, L ε
            assert own is not None
            L = rows.spread if rows.is_matrix else rows.spread.diag_embed()
            mean = self.residuals(site)
            covariance = L @ pairs_at(self._factor.noise, own, own) @ L.mT
        else:
            C, mean = self.counted_coefficients(site), residual
            assert moved is not None
            if diagonal:
                return mean, (moved * C).sum(-1).expand(mean.shape) + mean.square()
            covariance = moved @ C.mT
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
        covariance = pairs_at(self._factor.covariance, reading, reading)
        moved = None
        if own is None:
            moved = self.counted_coefficients(site) @ covariance
            cross = -moved
        else:
            L = rows.spread if rows.is_matrix else rows.spread.diag_embed()
            cross = L @ pairs_at(self._factor.noise_and_latents, own, reading)
        residual, second = self._residual_moments(site, diagonal, moved)
        mean = self._mean_read(site)
        return linear_moments(mean, covariance, residual, cross, second, diagonal)

    def sample(self, n: int, generator: torch.Generator | None = None) -> list[Tensor]:
        """Joint posterior draws of all latents. # (n, cells, elements, q) each, in the order of sites

        Args:
            n: Number of draws.
            generator: The source of randomness; by default torch's.
        """
        flat = self._delta + (self._factor.drawn(n, generator) if self._factor.dense else 0)
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
        flat = self._factor.drawn_from_prior(generator)
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
        n = drawn[0].shape[0] if drawn else 1
        none = self._delta.new_zeros(n, self.cells, self.layout.sites[site].rows, 0)
        return read_values(self.layout, site, dict(zip(latents, drawn, strict=True)), none)

    def entropy(self) -> Tensor:
        """Entropy of the posterior of each block, −inf at a variance of zero. # (cells, blocks)"""
        layout = self.layout
        sizes = layout.block_sizes.to(torch.float64)
        out = 0.5 * (1 + LOG_TWO_PI) * sizes - 0.5 * self._factor.log_determinants()
        for s, form in enumerate(layout.sites):
            if form.is_latent:
                each = self._rows[s].deviations.log().sum(-1).expand(self.cells, form.rows)
                out = added(out, layout.block_of_row[s], each)
        return out

    def _latent(self, site: int) -> tuple[Reading, Tensor]:
        own, centre = self.layout.own[site], self._centre[site]
        if own is None or centre is None:
            raise ValueError(f"{self.layout.sites[site].name!r} is observed: it is no unknown.")
        return own, centre

    def _mean_read(self, site: int) -> Tensor:
        """Posterior mean of what the mean of a site reads. # (cells, rows, Q)"""
        reading = self.layout.reads[site]
        centre = read_centres(self.layout, site, self._centre)
        return centre + read_at(self._delta, reading)

    def counted_coefficients(self, site: int) -> Tensor:
        """C, zero at entries of weight zero. # (·, ·, D, Q)"""
        rows = self._rows[site]
        if rows.weight is None:
            return rows.coefficients
        return rows.coefficients * (rows.weight > 0).unsqueeze(-1)


def solve(layout: BlockLayout, numbers: Sequence[SiteNumbers]) -> GaussianSolution:
    """Evidence and posterior of a linear-Gaussian component.

    Args:
        layout: Its blocks.
        numbers: The numbers of each of its sites.

    Raises:
        ValueError: If the numbers of a site do not fit its form.

    Example:
        >>> from pyro_em.posteriors.gaussians.site_forms import SiteForm, Term
        >>> term = Term(0, torch.zeros(2, dtype=torch.long))
        >>> sites = SiteForm("mean", 1, 1, is_latent=True), SiteForm("x", 2, 1, False, (term,))
        >>> one = torch.ones(1, 1, 1)
        >>> x = torch.tensor([[2.0], [4.0]])
        >>> data = SiteNumbers(x, 0 * one, one, (one[..., None],))
        >>> solution = solve(BlockLayout.of(sites), [SiteNumbers(None, 0 * one, one), data])
        >>> solution.mean(0).item()  # 6 / (1 + 2)
        2.0
    """
    rows = tuple(rows_of_site(layout, s, numbers[s]) for s in range(len(layout.sites)))
    cells = max((x.shape[0] for r in rows for x in (r.coefficients, r.spread, r.offset)), default=1)
    centre: list[Tensor | None] = []
    residual: list[Tensor | None] = []  # of observed sites at ε = 0
    for s, site in enumerate(rows):
        read = applied(site.coefficients, read_centres(layout, s, centre), layout.sites[s].rows)
        centre.append(site.offset + read if site.value is None else None)
        residual.append(None if site.value is None else (site.value - site.offset) - read)

    factor = joint_factor(layout, rows, cells)
    epsilon = torch.zeros(cells, layout.vector_size, dtype=torch.float64, device=layout.device)
    delta = epsilon
    for step in range(_STEPS if factor.dense else 0):  # the mode, and refinements of it
        move, short = factor.move(gradient_of(layout, rows, residual, delta), epsilon)
        epsilon = epsilon + move
        delta = factor.spread_out(epsilon)
        # Half of gᵀ Λ⁻¹ g is what the evidence was short of before this move.
        if step > 0 and not bool(short.max() > _SHORT):
            break

    log_evidence = delta.new_zeros(cells, 0)
    if factor.dense:
        log_evidence = -0.5 * (factor.log_determinants() + factor.squares(epsilon))
    constant = delta.new_zeros(cells)
    at_mode: list[Tensor | None] = []
    for s, site in enumerate(rows):
        start = residual[s]
        if start is None:
            at_mode.append(None)
            continue
        r = (start - applied(site.coefficients, read_at(delta, layout.reads[s]))).expand(
            cells, -1, -1
        )
        density = site.log_density(r)
        block = layout.block_of_row[s]
        alone = block < 0
        if bool(alone.any()):
            constant = constant + torch.where(alone, density, torch.zeros_like(density)).sum(1)
            log_evidence = added(log_evidence, block[~alone], density[:, ~alone])
        else:
            log_evidence = added(log_evidence, block, density)
        if site.weight is not None:
            r = torch.where(site.weight > 0, r, torch.zeros_like(r))
        at_mode.append(r)
    return GaussianSolution(
        layout,
        log_evidence,
        constant,
        any(site.degenerate for site in rows),
        rows,
        factor,
        tuple(centre),
        epsilon,
        delta,
        tuple(at_mode),
    )
