"""The M-step of Gaussian chains from sums: least squares of coefficients.

As `pyro_em.updates.regressions.gaussian_lines` has it, decided once and solved in numpy. Columns that
share no equation with others are known before any number is: those of a row of loadings are a small
system of their own, and systems of equal size are solved together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pyro_em.errors import Handover
from pyro_em.posteriors.chain_sums.state_arguments import Numbers, Places
from pyro_em.posteriors.chain_sums.state_sites import Site
from pyro_em.posteriors.chain_sums.state_sums import SiteNumbers, SiteSums

_CLEAR = (
    1e-11  # of the largest eigenvalue: below it the step through tables judges what is determined
)


@dataclass(frozen=True, eq=False)
class Line:
    """The normal equations of one site.

    Attributes:
        design: ∂(C, B)/∂θ by entries of the mean, the columns that each reads beside each other.
            # (lead, K, D, q, w)
        column: The unknown behind each; the last one stands for none. # (lead, K, D, w)
        gram_place: Where products of columns go among all systems. # (lead, K, D, w, w), or, where
            entries are correlated, (lead, K, D · w, D · w)
        cancels: Whether no spread matters, as every entry is regressed on the same.
    """

    design: Numbers
    column: Places
    gram_place: Places
    cancels: bool


@dataclass(frozen=True, eq=False)
class Regression:
    """Least squares of all coefficients.

    Attributes:
        unknowns: The element of θ that each unknown is. # (p,)
        systems: How many systems there are of each size. # pairs
        room: Numbers in the matrices of all systems.
        lines: Of each site; None where no coefficient is free.
    """

    unknowns: Places
    systems: tuple[tuple[int, int], ...]
    room: int
    lines: tuple[Line | None, ...]

    @classmethod
    def of(cls, sites: Sequence[Site], free: Places, size: int) -> Regression:
        """Decide it.

        Args:
            sites: The sites.
            free: Elements of θ that are coefficients to solve for.
            size: Elements of θ.
        """
        number = np.full(size, -1)
        number[free] = np.arange(len(free))
        read = [_columns(site, number) for site in sites]
        shared = _shared([None if own is None else own[1] for own in read], len(free))
        label = _labels(sites, read, shared)
        order = np.lexsort((np.arange(len(free)), label, np.bincount(label, minlength=1)[label]))
        place = np.empty(len(free) + 1, dtype=np.int64)
        place[order], place[-1] = np.arange(len(free)), len(free)
        sorted_label = label[order]
        first = np.flatnonzero(np.diff(sorted_label, prepend=-1)) if len(free) else order
        sizes = np.diff(np.append(first, len(free)))
        begin_of_system = np.concatenate([[0], np.cumsum(sizes**2)])
        system = np.repeat(np.arange(len(sizes)), sizes)
        # Of each unknown: where its system begins, its number there, and the size.
        base = np.append(begin_of_system[:-1][system], 0)
        inside = np.append(np.arange(len(free)) - first[system], 0)
        width = np.append(sizes[system], 0)
        room = int(begin_of_system[-1])
        lines: list[Line | None] = []
        for site, own in zip(sites, read, strict=True):
            if own is None:
                lines.append(None)
                continue
            design, column = own
            cancels = site.spread.is_matrix and _cancels(design, column, shared)
            column = place[column]
            flat = column
            if site.spread.is_matrix and not cancels:
                flat = column.reshape(*column.shape[:2], -1)
            a, b = flat[..., :, None], flat[..., None, :]
            there = (a < len(free)) & (b < len(free))
            gram = np.where(there, base[a] + inside[a] * width[a] + inside[b], room)
            lines.append(Line(design, column, gram, cancels))
        counts: dict[int, int] = {}
        for n in sizes.tolist():
            counts[n] = counts.get(n, 0) + 1
        return cls(free[order], tuple((c, n) for n, c in counts.items()), room, tuple(lines))

    def step(self, numbers: Sequence[SiteNumbers], sums: Sequence[SiteSums]) -> Numbers:
        """By how much each unknown moves; a last number stands for none. # (p + 1,)

        Raises:
            Handover: If the data do not clearly determine it.
        """
        p = len(self.unknowns)
        gram, right = np.zeros(self.room + 1), np.zeros(p + 1)
        for i, (own, s) in enumerate(zip(numbers, sums, strict=True)):
            self.add(i, own, s, gram, right)
        out = np.zeros(p + 1)
        at = column = 0
        for count, n in self.systems:
            matrices = gram[at : at + count * n * n].reshape(count, n, n)
            rights = right[column : column + count * n].reshape(count, n)
            out[column : column + count * n] = _solved(matrices, rights).reshape(-1)
            at, column = at + count * n * n, column + count * n
        return out

    def add(self, i: int, own: SiteNumbers, s: SiteSums, gram: Numbers, right: Numbers) -> None:
        """Add the normal equations of a site to those of all.

        Args:
            i: Its number.
            own: Its arguments at the E-step.
            s: Its sums.
            gram: The matrices of all systems. # (room + 1,)
            right: Their right-hand sides. # (p + 1,)
        """
        line = self.lines[i]
        if line is None:
            return
        J, flipped = line.design, line.design.swapaxes(-1, -2)
        r_phi = s.r_phi
        correlated = own.spread.ndim == 4
        if correlated and not line.cancels:
            inverse = np.linalg.inv(own.spread)
            precision = inverse.swapaxes(-1, -2) @ inverse  # (lead|1, K, D, D)
            lead, K, D, q, w = J.shape
            wide = J.transpose(0, 1, 3, 2, 4).reshape(lead, K, q, D * w)
            parts = wide.swapaxes(-1, -2) @ (s.phi_phi[:, :, 0] @ wide)
            parts *= precision.repeat(w, -1).repeat(w, -2)
            r_phi = precision @ r_phi
        else:
            parts = flipped @ (s.phi_phi @ J)
            if not correlated:
                weight = own.spread**-2
                parts = parts * weight[..., None, None]
                r_phi = r_phi * weight[..., None]
        gram += np.bincount(line.gram_place.reshape(-1), parts.reshape(-1), len(gram))
        pulled = flipped @ r_phi[..., None]
        right += np.bincount(line.column.reshape(-1), pulled.reshape(-1), len(right))

    def moved(self, i: int, s: SiteSums, step: Numbers) -> Numbers:
        """E[r rᵀ] of a site, or its diagonal, at the new coefficients: see `shifted`."""
        line = self.lines[i]
        if line is None:
            return s.r_r
        delta = (line.design @ step[line.column][..., None]).squeeze(-1)  # (lead, K, D, q)
        if s.r_r.ndim == 4:
            cross = s.r_phi @ delta.swapaxes(-1, -2)
            grown = delta @ s.phi_phi[:, :, 0] @ delta.swapaxes(-1, -2)
            out: Numbers = s.r_r - cross - cross.swapaxes(-1, -2) + grown
            return out
        quadratic = (np.matmul(delta[..., None, :], s.phi_phi).squeeze(-2) * delta).sum(-1)
        found: Numbers = s.r_r - 2 * (delta * s.r_phi).sum(-1) + quadratic
        return found


def _columns(site: Site, number: Places) -> tuple[Numbers, Places] | None:
    """The design of a site's free coefficients, and the unknown behind each column, −1 for none."""
    shape = site.lead, site.ranks, site.width
    rows, q = int(np.prod(shape)), site.reads.shape[1] + len(site.features)
    unknown = number[site.design.column] if len(site.design.column) else site.design.column
    free = unknown >= 0
    if not free.any():
        return None
    d = site.design
    row, place, unknown, factor = d.row[free], d.place[free], unknown[free], d.factor[free]
    pairs, which = np.unique(row * (int(unknown.max()) + 1) + unknown, return_inverse=True)
    of_row, of_unknown = np.divmod(pairs, int(unknown.max()) + 1)
    starts = np.searchsorted(of_row, np.arange(rows))
    slot = np.arange(len(pairs)) - starts[of_row]
    w = int(slot.max()) + 1
    column = np.full((rows, w), -1)
    column[of_row, slot] = of_unknown
    design = np.zeros((rows, q, w))
    np.add.at(design, (row, place, slot[which.reshape(-1)]), factor)
    return design.reshape(*shape, q, w), column.reshape(*shape, w)


def _shared(columns: Sequence[Places | None], size: int) -> NDArray[np.bool_]:
    """Which unknowns several sites, or several entries of one, read. # (p,)"""
    count = np.zeros(size + 1, dtype=np.int64)
    for column in columns:
        if column is not None:
            np.add.at(count, column.reshape(-1), 1)
    return count[:size] > 1


def _labels(
    sites: Sequence[Site],
    read: Sequence[tuple[Numbers, Places] | None],
    shared: NDArray[np.bool_],
) -> Places:
    """The system of each unknown: unknowns that share an equation share it. # (p,)"""
    size = len(shared)
    label = np.arange(size + 1)
    members = []
    for site, own in zip(sites, read, strict=True):
        if own is None:
            continue
        column = own[1]
        if site.spread.is_matrix and not _cancels(*own, shared):
            column = column.reshape(*column.shape[:2], -1)
        members.append(np.where(column >= 0, column, size).reshape(-1, column.shape[-1]))
    before = label - 1
    while not np.array_equal(label, before):
        before = label.copy()
        for m in members:
            least = np.where(m < size, label[m], size).min(-1, keepdims=True)
            np.minimum.at(label, m.reshape(-1), np.broadcast_to(least, m.shape).reshape(-1))
            label[size] = size
    return label[:size]


def _cancels(design: Numbers, column: Places, shared: NDArray[np.bool_]) -> bool:
    """Whether entries have the same regressors and no unknown in common: their noise cancels."""
    if design.shape[:2] != (1, 1) or bool((design != design[:, :, :1]).any()):
        return False
    return not bool(shared[column[column >= 0]].any())


def _solved(gram: Numbers, right: Numbers) -> Numbers:
    """The solution of systems whose columns are scaled to unit length. # (systems, columns)"""
    diagonal = gram.diagonal(0, -2, -1)
    if not bool((diagonal > 0).all()):
        raise Handover
    scale = 1 / np.sqrt(diagonal)
    scaled = gram * scale[..., None] * scale[:, None]
    if gram.shape[-1] == 1:
        return right / gram[..., 0]
    eigenvalues, vectors = np.linalg.eigh(scaled)
    if not bool((eigenvalues[:, 0] > _CLEAR * eigenvalues[:, -1]).all()):
        raise Handover
    inner = (vectors.swapaxes(-1, -2) @ (scale * right)[..., None]) / eigenvalues[..., None]
    out: Numbers = scale * (vectors @ inner).squeeze(-1)
    return out
