"""Leaves eliminated side by side: what they leave of the core, and what they are given it.

With noises ε of a leaf and unknowns h_b of the core that it reads, h = c + T ε + R h_b. Rows say M of
(h, h_b), so that

    Λ_ll = I + Tᵀ M_ll T = L Lᵀ,     Λ_lb = Tᵀ (M_ll R + M_lb),     K = Λ_ll⁻¹ Λ_lb,

and of the core's matrix M the leaf changes Rᵀ M_ll R + Rᵀ M_lb + M_bl R − Λ_bl Λ_ll⁻¹ Λ_lb. Given the
core, ε is N(m − K (h_b − m_b), Λ_ll⁻¹), and h varies with it as G = R − T K. No prior is inverted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import nan
from typing import Any

import torch
from torch import Tensor

from pyro_em.posteriors.gaussians.block_factors import (
    MOST,
    loses,
    moved_factor,
    substituted,
    weighed_rows,
    without_cached,
)
from pyro_em.posteriors.gaussians.block_places import Leaves
from pyro_em.posteriors.gaussians.flat_reads import added
from pyro_em.posteriors.gaussians.gaussian_layout import BlockLayout
from pyro_em.posteriors.gaussians.site_rows import SiteRows
from pyro_em.posteriors.gaussians.square_root import square_root

_AT_ONCE = 2**22  # numbers that are held of many leaves at once

_PLACED = 20  # products of numbers in the time in which one is added to a place, or read from one


@dataclass(frozen=True, eq=False)
class LeafFactor:
    """The factors of the leaves of one batch.

    Attributes:
        leaves: Which ones.
        T: # (cells, J, p, p)
        R: None where the means of the leaf's unknowns read nothing of the core. # (cells, J, p, q)
        cholesky: L. # (cells, J, p, p)
        half: L⁻¹ Λ_lb. # (cells, J, p, q)
    """

    leaves: Leaves
    T: Tensor
    R: Tensor | None
    cholesky: Tensor
    half: Tensor

    def __getstate__(self) -> dict[str, Any]:
        return without_cached(self)

    @cached_property
    def K(self) -> Tensor:
        """Λ_ll⁻¹ Λ_lb. # (cells, J, p, q)"""
        return solved_upper(self.cholesky, self.half)

    @cached_property
    def G(self) -> Tensor:
        """R − T K. # (cells, J, p, q)"""
        moved = multiplied(self.T, self.K)
        return -moved if self.R is None else self.R - moved

    @cached_property
    def inverse(self) -> Tensor:
        """L⁻¹. # (cells, J, p, p)"""
        eye = torch.eye(self.leaves.size, dtype=self.T.dtype, device=self.T.device)
        return solved_lower(self.cholesky, eye.expand_as(self.cholesky))

    def of_core(self, flat: Tensor) -> Tensor:
        """What each leaf reads of a flat vector. # (cells, J, q)"""
        return flat[:, self.leaves.boundary.vector]

    def own(self, flat: Tensor) -> Tensor:
        """The leaves' part of a flat vector. # (cells, J, p)"""
        return flat[:, self.leaves.vector].reshape(-1, self.leaves.count, self.leaves.size)

    def solve(self, gradient: Tensor) -> Tensor:
        """Λ_ll⁻¹ g. # (cells, J, p)"""
        half = solved_lower(self.cholesky, gradient.unsqueeze(-1))
        return solved_upper(self.cholesky, half).squeeze(-1)

    def spread_out(self, epsilon: Tensor, core: Tensor) -> Tensor:
        """T ε + R h_b. # (cells, J, p)"""
        out = times(self.T, epsilon)
        return out if self.R is None else out + times(self.R, self.of_core(core))

    def given(self, z: Tensor) -> Tensor:
        """Deviations T L⁻ᵀ z of the leaves given the core. # (cells, J, p, n), as z"""
        return multiplied(self.T, solved_upper(self.cholesky, z))

    def rows_of(self, own: Tensor, beside: Tensor | None) -> Tensor:
        """Rows of leaves as they lie in the flat matrices; zero where they are not known."""
        if beside is None:
            beside = own.new_zeros(*own.shape[:-1], self.leaves.reads)
        return torch.cat([own, beside], -1).flatten(1)


@dataclass(frozen=True, eq=False)
class LeafMoments:
    """The posterior of the leaves of one batch.

    Attributes:
        factor: Of the leaves given the core.
        core: Cov(h) of the core, the flat matrices.
    """

    factor: LeafFactor
    core: Tensor

    @cached_property
    def covariance(self) -> Tensor:
        """The leaves' rows of Cov(h). # (cells, J * p * (p + q))"""
        f = self.factor
        own = multiplied(self._spreading.mT, self._spreading) + multiplied(self._moved, f.G.mT)
        return f.rows_of(own, self._moved)

    @cached_property
    def noise(self) -> Tensor:
        """The leaves' own part of Cov(ε). # (cells, J * p * (p + q))"""
        f = self.factor
        own = multiplied(f.inverse.mT, f.inverse) - multiplied(self._moved_noise, f.K.mT)
        return f.rows_of(own, None)

    @cached_property
    def noise_and_latents(self) -> Tensor:
        """The leaves' rows of Cov(ε, h). # (cells, J * p * (p + q))"""
        f = self.factor
        own = multiplied(f.inverse.mT, self._spreading)
        return f.rows_of(own + multiplied(self._moved_noise, f.G.mT), self._moved_noise)

    @cached_property
    def _spreading(self) -> Tensor:
        """L⁻¹ Tᵀ. # (cells, J, p, p)"""
        return multiplied(self.factor.inverse, self.factor.T.mT)

    @cached_property
    def _moved_noise(self) -> Tensor:
        """Cov(ε, h_b) = −K Cov(h_b). # (cells, J, p, q)"""
        return -through(self.factor.leaves, self.factor.K, self.core)

    @cached_property
    def _moved(self) -> Tensor:
        """Cov(h, h_b) = G Cov(h_b). # (cells, J, p, q)"""
        f = self.factor
        if f.R is None:
            return multiplied(f.T, self._moved_noise)
        return through(f.leaves, f.G, self.core)


class CoreSum:
    """The core's flat matrices, to which leaves add; what is added to places goes in at once.

    Attributes:
        total: What they are so far, but for what waits. # (cells|1, core's part of the flat matrices)
    """

    def __init__(self, total: Tensor) -> None:
        self.total = total
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def add(self, leaves: Leaves, left: Tensor, right: Tensor) -> None:
        """Add Σ leftᵀ right at the leaves' boundaries.

        Args:
            leaves: The batch.
            left: # (cells, J, m, q)
            right: # (cells, J, m, q)
        """
        cells, q = max(len(left), len(right)), leaves.reads
        if q == 0:
            return
        if _is_dense(leaves):
            core = leaves.matrix_of_core
            assert core is not None
            whole = self.total[:, core]
            for some in _portions(leaves, cells * left.shape[-2] * _core_size(leaves)):
                said = _over_core(leaves, left, some).mT @ _over_core(leaves, right, some)
                whole = whole + said.flatten(1)
            cells = len(whole)
            before, after = self.total[:, : core.start], self.total[:, core.stop :]
            parts = before.expand(cells, -1), whole, after.expand(cells, -1)
            self.total = torch.cat(parts, 1)
            return
        for some in _portions(leaves, cells * q * q):
            found = multiplied(left[:, some].mT, right[:, some]).flatten(1)
            self._waiting.append((leaves.boundary.pairs(some).reshape(-1), found))
            if sum(x.numel() for _, x in self._waiting) > _AT_ONCE:
                self._let_in()

    def _let_in(self) -> None:
        cells = max(len(self.total), *(len(x) for _, x in self._waiting))
        places = torch.cat([at for at, _ in self._waiting])
        values = torch.cat([x.expand(cells, -1) for _, x in self._waiting], 1)
        self.total = added(self.total.expand(cells, -1), places, values)
        self._waiting = []

    def all(self) -> Tensor:
        """The total of everything."""
        if self._waiting:
            self._let_in()
        return self.total


def eliminated(
    layout: BlockLayout,
    leaves: Leaves,
    rows: Sequence[SiteRows],
    cells: int,
    flat: Tensor,
    said: CoreSum,
    taken: CoreSum,
) -> LeafFactor:
    """The factors of some leaves; what they say of the core is added to its matrix.

    Args:
        layout: The blocks.
        leaves: The batch.
        rows: The numbers of the sites.
        cells: Combinations of discrete values.
        flat: M, the flat matrices. # (cells|1, matrix_size)
        said: Takes what rows say of the core through the means of leaves.
        taken: Takes what the core loses as leaves are determined by the rows too.
    """
    J, p, q = leaves.count, leaves.size, leaves.reads
    both = substituted(layout, leaves, rows, cells)
    T = both[..., :p]
    M = flat[:, leaves.matrix].reshape(-1, J, p, p + q)
    own, beside = M[..., :p], M[..., p:]
    R = both[..., p:] if any(c is not None for m in leaves.members for c in m.columns) else None
    if R is not None:
        moved = multiplied(own, R)
        said.add(leaves, R, moved + beside)
        said.add(leaves, beside, R)
        beside = beside + moved
    eye = torch.eye(p, dtype=T.dtype, device=T.device)
    information = eye + multiplied(multiplied(T.mT, own), T)
    coupling = multiplied(T.mT, beside)
    factor = _factorized(layout, leaves, rows, T, R, own, information, coupling)
    taken.add(leaves, -factor.half, factor.half)
    return factor


def multiplied(a: Tensor, b: Tensor) -> Tensor:
    """a b of batches of matrices, number by number where they are numbers. # (..., m, n)"""
    return a * b if a.shape[-1] == 1 else a @ b


def times(a: Tensor, x: Tensor) -> Tensor:
    """a x of batches. # (..., m)"""
    return multiplied(a, x.unsqueeze(-1)).squeeze(-1)


def solved_lower(L: Tensor, x: Tensor) -> Tensor:
    """L⁻¹ x. # as x"""
    return x / L if L.shape[-1] == 1 else torch.linalg.solve_triangular(L, x, upper=False)


def solved_upper(L: Tensor, x: Tensor) -> Tensor:
    """L⁻ᵀ x. # as x"""
    return x / L if L.shape[-1] == 1 else torch.linalg.solve_triangular(L.mT, x, upper=True)


def _is_dense(leaves: Leaves) -> bool:
    """Whether products with the whole matrix of the core are quicker than reading parts of it."""
    if leaves.matrix_of_core is None:
        return False
    return leaves.is_whole or _PLACED * leaves.reads**2 > leaves.size * _core_size(leaves) ** 2


def _core_size(leaves: Leaves) -> int:
    assert leaves.matrix_of_core is not None
    return round((leaves.matrix_of_core.stop - leaves.matrix_of_core.start) ** 0.5)


def _over_core(leaves: Leaves, x: Tensor, some: slice) -> Tensor:
    """What belongs to the boundaries of some leaves, over the whole core. # (cells, n * m, c)"""
    x = x[:, some]
    if not leaves.is_whole:
        c = _core_size(leaves)
        at = leaves.boundary.column[some].unsqueeze(-2).expand_as(x)
        x = x.new_zeros(*x.shape[:-1], c).scatter_add(-1, at, x)
    return x.flatten(1, 2)


def _portions(leaves: Leaves, each: int) -> list[slice]:
    step = max(1, _AT_ONCE // max(1, each))
    return [slice(i, min(i + step, leaves.count)) for i in range(0, leaves.count, step)]


def through(leaves: Leaves, x: Tensor, flat: Tensor) -> Tensor:
    """x times the core's matrix at each leaf's boundary. # (cells, J, m, q), as x

    Args:
        leaves: The batch.
        x: # (cells, J, m, q)
        flat: The flat matrices. # (cells, at least those of the core)
    """
    if leaves.reads == 0:
        return x
    out = []
    if _is_dense(leaves):
        core, c = leaves.matrix_of_core, _core_size(leaves)
        matrix = flat[:, core].reshape(-1, c, c)
        for some in _portions(leaves, x.shape[0] * x.shape[-2] * c):
            found = (_over_core(leaves, x, some) @ matrix).unflatten(1, (-1, x.shape[-2]))
            if not leaves.is_whole:
                at = leaves.boundary.column[some].unsqueeze(-2)
                found = found.gather(-1, at.expand(*found.shape[:-1], leaves.reads))
            out.append(found)
    else:
        for some in _portions(leaves, x.shape[0] * leaves.reads**2):
            out.append(x[:, some] @ flat[:, leaves.boundary.pairs(some)])
    return out[0] if len(out) == 1 else torch.cat(out, 1)


def _factorized(
    layout: BlockLayout,
    leaves: Leaves,
    rows: Sequence[SiteRows],
    T: Tensor,
    R: Tensor | None,
    own: Tensor,
    information: Tensor,
    coupling: Tensor,
) -> LeafFactor:
    """The factor of Λ_ll, from the rows themselves where Λ_ll has lost digits."""
    cholesky, failed = _cholesky(information)
    with torch.no_grad():
        finite = information.isfinite().flatten(2).all(-1)
        reach = own.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt().unsqueeze(-2) @ T.abs()
        poor = (loses(reach.squeeze(-2), cholesky) | failed) & finite
        exact = leaf_triangles(layout, leaves, rows, T, R) if bool(poor.any()) else None
    if exact is None:
        cholesky = torch.where(failed[..., None, None], torch.full_like(cholesky, nan), cholesky)
        return LeafFactor(leaves, T, R, cholesky, solved_lower(cholesky, coupling))
    p = leaves.size
    cholesky, half = exact[..., :p, :p], exact[..., p:, :p].mT
    if information.requires_grad or coupling.requires_grad:
        cholesky = moved_factor(cholesky, information)
        derivative = solved_lower(cholesky, coupling)
        half = half + (derivative - derivative.detach())
    return LeafFactor(leaves, T, R, cholesky, half)


def _cholesky(information: Tensor) -> tuple[Tensor, Tensor]:
    """Lower factors, and where there are none."""
    if information.shape[-1] == 1:
        return information.sqrt(), ~(information[..., 0, 0] > 0)
    cholesky, failed = torch.linalg.cholesky_ex(information)
    return cholesky, failed != 0


def leaf_triangles(
    layout: BlockLayout, leaves: Leaves, rows: Sequence[SiteRows], T: Tensor, R: Tensor | None
) -> Tensor | None:
    """The lower factors of (Λ_ll, Λ_lb; Λ_bl, Λ_bb) by QR; None if the rows are too many.

    Λ_bb is that of the leaf's rows alone, without the core's prior: the last q rows are what these rows
    say of the core.

    Returns:
        # (cells, J, p + q, p + q)
    """
    cells, J, p = T.shape[:3]
    d, q = leaves.columns, leaves.reads
    chosen = []
    for s, site in enumerate(rows):
        leaf, reading = layout.leaf_of_row[s] - leaves.first, layout.reads[s]
        if site.value is not None and reading.size:
            inside = ((leaf >= 0) & (leaf < J)).nonzero().squeeze(-1)
            chosen.append((site, reading, inside, leaf[inside]))
    if cells * d * sum(len(r) * max(s.coefficients.shape[-2:]) for s, _, r, _ in chosen) > MOST:
        return None
    if cells * J * d * d > MOST:
        return None
    beside = T.new_zeros(cells, J, p, q) if R is None else R
    below = torch.eye(d, dtype=T.dtype, device=T.device)[p:].expand(cells, J, q, d)
    basis = torch.cat([torch.cat([T, beside], -1), below], -2).reshape(cells, J * d, d)
    out, of = [T.new_zeros(cells, 0, d)], [leaves.block.new_zeros(0)]
    for site, reading, r, leaf in chosen:
        W = weighed_rows(site, r)
        places = leaf.unsqueeze(-1) * d + reading.column[r].clamp(max=d - 1)
        out.append((W @ basis[:, places]).flatten(1, 2))
        of.append(leaf.repeat_interleave(W.shape[-2]))
    return square_root(torch.cat(out, 1), torch.cat(of), J, p)
