"""The matrices of the blocks of a linear-Gaussian component, and their factors.

    Λ = I + Tᵀ M T,     M = Σ_rows Cᵀ P C,     Λ = R Rᵀ

T leads from noises to unknowns by substitution in topological order; M is what observed rows say of the
unknowns. What rounding does to log|Λ| is about the size of the terms of Λ_ii relative to the pivots:
where that is too much, R is taken from the rows themselves by a QR decomposition.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyro_em.posteriors.gaussians.block_places import Bucket, Reading, Run, places_between
from pyro_em.posteriors.gaussians.flat_reads import added, read_at
from pyro_em.posteriors.gaussians.gaussian_layout import BlockLayout
from pyro_em.posteriors.gaussians.site_rows import SiteRows, applied
from pyro_em.posteriors.gaussians.square_root import square_root

_MANY = 2**24  # numbers that the rows of one site may add to M at once

MOST = 2**27  # numbers that the rows of some blocks may take in all

_EPSILON = 2.0**-53

_LARGE = 32  # unknowns of a block from which on products of its matrices are worth avoiding

_LOSS = 1e-11  # nats that the log evidence of a block may lose where its rows could do better


@dataclass(frozen=True, eq=False)
class BlockFactor:
    """The factors of the matrices of one bucket.

    Attributes:
        bucket: Which one.
        T: # (cells, B, d, d)
        cholesky: The lower factor of Λ. # (cells, B, d, d)
        scale: The diagonal of T where it is a large diagonal matrix (no latent of the block reads
            another); None elsewhere. # (cells, B, d)
    """

    bucket: Bucket
    T: Tensor
    cholesky: Tensor
    scale: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return without_cached(self)

    @cached_property
    def noise(self) -> Tensor:
        """Cov(ε) = Λ⁻¹. # (cells, B, d, d)"""
        if self.scale is not None:
            return torch.cholesky_inverse(self.cholesky)
        return self._inverse.mT @ self._inverse

    @cached_property
    def covariance(self) -> Tensor:
        """Cov(h) = T Λ⁻¹ Tᵀ. # (cells, B, d, d)"""
        if self.scale is not None:
            return self.scale.unsqueeze(-1) * self.noise_and_latents
        return self._spreading.mT @ self._spreading

    @cached_property
    def noise_and_latents(self) -> Tensor:
        """Cov(ε, h) = Λ⁻¹ Tᵀ. # (cells, B, d, d)"""
        if self.scale is not None:
            return self.noise * self.scale.unsqueeze(-2)
        return self._inverse.mT @ self._spreading

    @cached_property
    def _inverse(self) -> Tensor:
        """The inverse of `cholesky`. # (cells, B, d, d)"""
        eye = torch.eye(self.bucket.size, dtype=self.T.dtype, device=self.T.device)
        return torch.linalg.solve_triangular(
            self.cholesky, eye.expand_as(self.cholesky), upper=False
        )

    @cached_property
    def _spreading(self) -> Tensor:
        """K = cholesky⁻¹ Tᵀ, so that the covariance of h is KᵀK. # (cells, B, d, d)"""
        return self._inverse @ self.T.mT

    def drawn(self, z: Tensor) -> Tensor:
        """Posterior deviations of h, T L⁻ᵀ z. # (cells, B, d, n), as z"""
        return self.T @ torch.linalg.solve_triangular(self.cholesky.mT, z, upper=True)

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


def without_cached(value: Any) -> dict[str, Any]:
    """The fields of a value, with which a copy begins: the rest follows from them."""
    return {f.name: getattr(value, f.name) for f in fields(value)}


def precision_of(layout: BlockLayout, rows: Sequence[SiteRows], cells: int) -> Tensor:
    """M = Σ Cᵀ P C of observed rows, the flat matrices. # (cells|1, matrix_size)"""
    total = torch.zeros(1, layout.matrix_size, dtype=torch.float64, device=layout.device)
    for k in sorted({1, cells}):  # what all cells share is added once
        places, terms, size = [], [], 0  # what many small sites add goes at once
        for s, site in enumerate(rows):
            if site.value is None or layout.reads[s].size == 0 or site.whitened.shape[0] != k:
                continue
            for at, found in _grams(site, layout.reads[s], layout.sites[s].rows):
                places.append(at.reshape(-1))
                terms.append(found.reshape(k, -1))
                size += terms[-1].numel()
                if size >= _MANY:
                    total = added(total.expand(k, -1), torch.cat(places), torch.cat(terms, 1))
                    places, terms, size = [], [], 0
        if places:
            total = added(total.expand(k, -1), torch.cat(places), torch.cat(terms, 1))
    return total


def _grams(site: SiteRows, reading: Reading, n: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Cᵀ P C of the rows of a site, and its places; of what all rows read alike the sum."""
    whole = [Run(slice(0, reading.size), False, False)]
    runs = reading.runs if reading.in_core or reading.common else whole
    for i in runs:
        for j in runs:
            if i.in_core and not j.in_core and reading.in_core:
                continue  # it has the place of (j, i)
            if i.common and j.common:
                at = places_between(reading, i, reading, j, slice(0, 1))
                yield at, _gram_of_all(site, i.own, j.own, n)
                continue
            width = (i.own.stop - i.own.start) * (j.own.stop - j.own.start)
            step = max(1, _MANY // (len(site.whitened) * width))
            if torch.is_grad_enabled() and site.whitened.requires_grad:
                step = max(1, n)
            for begin in range(0, n, step):
                chunk = slice(begin, min(begin + step, n))
                at = places_between(reading, i, reading, j, chunk)
                yield at, _gram(site, chunk, i.own, j.own)


def _gram(site: SiteRows, rows: slice, i: slice, j: slice) -> Tensor:
    """Cᵀ P C of each row and some coordinates. # (cells|1, rows, q_i, q_j)"""
    W = site.whitened if site.whitened.shape[1] == 1 else site.whitened[:, rows]
    left, right = W[..., i], W[..., j]
    if site.weight is not None:
        weight = site.weight if site.weight.shape[0] == 1 else site.weight[rows]
        right = right * weight.unsqueeze(-1)
    gram = left.mT * right if W.shape[-2] == 1 else left.mT @ right
    return gram.expand(-1, rows.stop - rows.start, -1, -1)


def _gram_of_all(site: SiteRows, i: slice, j: slice, n: int) -> Tensor:
    """The sum of Cᵀ P C over all rows. # (cells|1, q_i, q_j)"""
    W = site.whitened.expand(-1, n, -1, -1)
    left, right = W[..., i], W[..., j]
    if site.weight is not None:
        right = right * site.weight.unsqueeze(-1)
    return left.flatten(1, 2).mT @ right.flatten(1, 2)


def gradient_of(
    layout: BlockLayout, rows: Sequence[SiteRows], residual: Sequence[Tensor | None], delta: Tensor
) -> Tensor:
    """Σ Cᵀ P r at h = c + δ, a flat vector. # (cells, vector_size)"""
    out = torch.zeros_like(delta)
    for s, site in enumerate(rows):
        start, reading = residual[s], layout.reads[s]
        if start is None or reading.size == 0:
            continue
        r = start - applied(site.coefficients, read_at(delta, reading))
        out = added(out, reading.vector, applied(site.whitened.mT, site.weigh(site.whiten(r))))
    return out


def substituted(
    layout: BlockLayout, bucket: Bucket, rows: Sequence[SiteRows], cells: int
) -> Tensor:
    """T of the blocks of a bucket, from parents to children; zero in the padding.

    Returns:
        # (cells, B, d, d); of leaves T and, beside it, R. # (cells, J, p, p + q)
    """
    of_latent: dict[int, Tensor] = {}  # rows of T. (·, n, q, d)
    for member in bucket.members:
        form, site = layout.sites[member.site], rows[member.site]
        n, q = len(member.positions), form.width
        L = site.spread if site.is_matrix else site.spread.diag_embed()
        L = _of_members(L, member.elements).expand(-1, n, -1, -1)
        places = member.positions[:, None, None] + torch.arange(q, device=layout.device)
        T = L.new_zeros(L.shape[0], n, q, bucket.columns)
        T = T.scatter(-1, places.expand(L.shape[0], n, q, q), L)
        begin = 0
        for term, parents, at in zip(form.terms, member.parents, member.columns, strict=True):
            width = layout.sites[term.latent].width
            end = begin + width
            if parents is not None:
                C = _of_members(site.coefficients[..., begin:end], member.elements)
                T = T + C @ of_latent[term.latent][:, parents]
            elif at is not None:  # of the core, whose unknowns have columns of their own
                C = _of_members(site.coefficients[..., begin:end], member.elements)
                C = C.expand(C.shape[0], n, q, width)
                own = at[:, None, None] + torch.arange(width, device=layout.device)
                T = T.expand(max(len(T), len(C)), -1, -1, -1)
                C = C.expand(len(T), -1, -1, -1)
                T = T.scatter_add(-1, own.expand(C.shape), C)
            begin = end
        of_latent[member.site] = T
    stacked = [T.expand(cells, -1, -1, -1).flatten(1, 2) for T in of_latent.values()]
    none = torch.zeros(cells, 1, bucket.columns, dtype=torch.float64, device=layout.device)
    stacked.append(none)  # what padding takes
    shape = cells, bucket.count, bucket.size, bucket.columns
    return torch.cat(stacked, 1).index_select(1, bucket.order).reshape(shape)


def _scale_of(
    layout: BlockLayout, bucket: Bucket, rows: Sequence[SiteRows], T: Tensor
) -> Tensor | None:
    """The diagonal of T where it is a large diagonal matrix, by its form. # (cells, B, d)"""
    for member in bucket.members:
        is_read = any(parents is not None for parents in member.parents)
        is_full = rows[member.site].is_matrix and layout.sites[member.site].width > 1
        if is_read or is_full:
            return None
    return T.diagonal(dim1=-2, dim2=-1) if bucket.size >= _LARGE else None


def factorized(
    layout: BlockLayout,
    bucket: Bucket,
    rows: Sequence[SiteRows],
    T: Tensor,
    M: Tensor,
    said: Tensor,
    from_rows: Callable[[Tensor], Tensor | None],
) -> BlockFactor:
    """Λ = I + Tᵀ M T and its factor, from the rows themselves where that would lose digits.

    Args:
        layout: The blocks.
        bucket: Those of one size.
        rows: The numbers of the sites.
        T: # (cells, B, d, d)
        M: # (cells|1, B, d, d)
        said: The diagonal of M before leaves were eliminated. # (cells|1, B, d)
        from_rows: The factors of some blocks of the bucket from the rows; None if these are too many.
    """
    eye = torch.eye(bucket.size, dtype=T.dtype, device=T.device)
    scale = _scale_of(layout, bucket, rows, T)
    if scale is None:
        information = eye + T.mT @ M @ T
    else:
        information = eye + scale.unsqueeze(-1) * M * scale.unsqueeze(-2)
    cholesky, failed = torch.linalg.cholesky_ex(information)
    with torch.no_grad():
        reach = said.clamp(min=0).sqrt().unsqueeze(-2)
        reach = reach @ T.abs() if scale is None else reach * scale.abs().unsqueeze(-2)
        finite = information.isfinite().flatten(2).all(-1)
        poor = (loses(reach.squeeze(-2), cholesky) | (failed != 0)) & finite
        which = poor.any(0).nonzero().squeeze(-1)
        exact = from_rows(which) if len(which) else None
        if exact is None:
            wrong = (failed != 0)[..., None, None]
    if exact is None:  # numbers that are not finite: the answer says so, without an error
        cholesky = torch.where(wrong, torch.full_like(cholesky, math.nan), cholesky)
        return BlockFactor(bucket, T, cholesky, scale)

    if information.requires_grad:
        exact = moved_factor(exact, information[:, which])
        replaced = torch.zeros_like(poor[0])
        replaced[which] = True
        safe = torch.where(replaced[:, None, None], eye, information)
        cholesky, failed = torch.linalg.cholesky_ex(safe)
    cholesky = torch.where(
        (failed != 0)[..., None, None] & ~finite[..., None, None], math.nan, cholesky
    )
    return BlockFactor(bucket, T, cholesky.index_copy(1, which, exact), scale)


def loses(reach: Tensor, cholesky: Tensor) -> Tensor:
    """Whether rounding may do too much to log|Λ|: the terms of Λ_ii relative to the pivots.

    Args:
        reach: Roots of the terms that rows add to Λ_ii. # (cells, B, d)
        cholesky: The factor of Λ. # (cells, B, d, d)

    Returns:
        # (cells, B)
    """
    pivots = cholesky.diagonal(dim1=-2, dim2=-1).square()
    return _EPSILON * ((1 + reach.square()) / pivots).amax(-1) > _LOSS


def moved_factor(exact: Tensor, information: Tensor) -> Tensor:
    """A factor with the derivatives of that of Λ: of L⁻¹ Λ L⁻ᵀ, which is the identity here."""
    eye = torch.eye(exact.shape[-1], dtype=exact.dtype, device=exact.device)
    moved = information - information.detach()
    half = torch.linalg.solve_triangular(exact, moved, upper=False)
    moved = torch.linalg.solve_triangular(exact, half.mT, upper=False)
    return exact @ torch.linalg.cholesky_ex(eye + moved).L


@dataclass(frozen=True, eq=False)
class RowsOfCore:
    """What leaves say of the core, as whitened rows.

    Attributes:
        rows: # (cells, J, n, q)
        places: Where the unknowns lie in a flat vector. # (J, q)
        block: The block of each leaf. # (J,)
    """

    rows: Tensor
    places: Tensor
    block: Tensor


def factor_from_rows(
    layout: BlockLayout,
    bucket: Bucket,
    rows: Sequence[SiteRows],
    T: Tensor,
    which: Tensor,
    leaves: Sequence[RowsOfCore] = (),
) -> Tensor | None:
    """The factors of some blocks of a bucket by QR; None if the rows are too many.

    Args:
        layout: The blocks.
        bucket: Those of one size.
        rows: The numbers of the sites.
        T: # (cells, B, d, d)
        which: Numbers of blocks in the bucket. # (n,)
        leaves: What stands for the rows that read leaves.

    Returns:
        # (cells, n, d, d)
    """
    cells, B, d = T.shape[:3]
    number = torch.full((layout.blocks,), -1, device=T.device)
    number[bucket.first + which] = torch.arange(len(which), device=T.device)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []  # rows, their places and their blocks
    for said in leaves:
        inside = number[said.block]
        own = (inside >= 0).nonzero().squeeze(-1)
        parts.append((said.rows[:, own], said.places[own], inside[own]))
    for s, site in enumerate(rows):
        block, reading = layout.block_of_row[s], layout.reads[s]
        if site.value is None or not reading.size:
            continue
        inside = torch.where(block >= 0, number[block.clamp(min=0)], block)
        if layout.leaves:
            inside = torch.where(layout.leaf_of_row[s] >= 0, -1, inside)
        own = (inside >= 0).nonzero().squeeze(-1)
        parts.append((weighed_rows(site, own), reading.vector[own], inside[own]))
    size = sum(len(own) * max(W.shape[-2:]) for W, own, _ in parts)
    if cells * size * d > MOST:
        return None
    flat_T = T.reshape(cells, B * d, d)
    out, blocks = [T.new_zeros(cells, 0, d)], [which[:0]]
    for W, places, inside in parts:
        # A missing read takes any row: its coefficients are zero.
        at = (places - bucket.vector.start).clamp(0, B * d - 1)
        out.append((W @ flat_T[:, at]).flatten(1, 2))
        blocks.append(inside.repeat_interleave(W.shape[-2]))
    return square_root(torch.cat(out, 1), torch.cat(blocks), len(which))


def weighed_rows(site: SiteRows, r: Tensor) -> Tensor:
    """What some rows of a site say: L⁻¹ C by the roots of their weights. # (·, n, D, Q)"""
    W = site.whitened
    W = (W if W.shape[1] == 1 else W[:, r]).expand(-1, len(r), -1, -1)
    if site.weight is not None:
        weight = site.weight if site.weight.shape[0] == 1 else site.weight[r]
        W = W * weight.sqrt().unsqueeze(-1)
    return W


def _of_members(x: Tensor, elements: Tensor | None) -> Tensor:
    """The rows of some elements; what all rows share as it is. # (·, n|1, ...)"""
    return x if elements is None or x.shape[1] == 1 else x[:, elements]


def log_determinants(factors: Sequence[BlockFactor]) -> Tensor:
    """log|Λ| of each block. # (cells, blocks)"""
    logs = [2 * f.cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1) for f in factors]
    return torch.cat(logs, 1)


def squares_of(factor: BlockFactor, epsilon: Tensor) -> Tensor:
    """‖ε‖² of each block. # (cells, B)"""
    bucket = factor.bucket
    return epsilon[:, bucket.vector].reshape(-1, bucket.count, bucket.size).square().sum(-1)
