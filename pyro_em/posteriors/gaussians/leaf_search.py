"""Which latents of large blocks are eliminated last: the core, without which blocks fall into leaves.

The precision of crossed effects, or of groups beside weights with priors, is an arrow: the elements of
the largest plate do not meet each other. Without the latents of the core the unknowns fall into small
connected components, *leaves*, which are independent given the core. Leaves are eliminated side by
side, as batches of small matrices; what is left is a dense matrix of the core alone,

    S = Λ_cc − Σ_leaves Λ_cl Λ_ll⁻¹ Λ_lc.

Source: George and Liu (1981), "Computer Solution of Large Sparse Positive Definite Systems", chapter 6;
Bates, Mächler, Bolker and Walker (2015), "Fitting linear mixed-effects models using lme4", section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pyro_em.posteriors.gaussians.block_search import Ints, anchors, components
from pyro_em.posteriors.gaussians.site_forms import SiteForm

_FEW = 48  # unknowns of a block up to which one dense matrix is quick

_GAIN = 0.5  # of the work of dense blocks that leaves may take at most

_MATRIX = 200.0  # products of numbers in the time that a small matrix of a batch takes besides

_SCATTERED = 20.0  # products in the time in which one number is added to a place

Flags = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Boundary:
    """The elements of the core that the rows of each leaf read.

    Attributes:
        leaf: Of each pair of a leaf and an element, in ascending order. # (pairs,)
        element: Ascending within a leaf. # (pairs,)
    """

    leaf: Ints
    element: Ints

    def find(self, leaf: Ints, element: Ints) -> Ints:
        """The number of each pair. # as leaf"""
        size = int(self.element.max(initial=0)) + 1
        return np.searchsorted(self.leaf * size + self.element, leaf * size + element)


def leaves_of(columns: Sequence[Sequence[Ints]], in_core: Flags) -> Ints:
    """The leaf of each element; −1 in the core. # (elements,)

    Args:
        columns: The elements that each row of each site reads, −1 where none, its own last.
        in_core: Of each element.
    """
    outside = [[np.where(in_core[c] | (c < 0), -1, c) for c in site] for site in columns]
    label = components([s for s in outside if len(s) > 1], len(in_core))
    label[in_core] = -1
    return np.unique(label, return_inverse=True)[1].astype(np.int64) - int(in_core.any())


def boundary_of(columns: Sequence[Sequence[Ints]], leaf: Ints) -> Boundary:
    """What the rows of each leaf read of the core.

    Args:
        columns: As of `leaves_of`.
        leaf: The leaf of each element; −1 in the core.
    """
    size, keys = len(leaf), [np.zeros(0, np.int64)]
    for site in columns:
        own = leaf_of_rows(site, leaf)
        for column in site:
            there = (own >= 0) & (column >= 0)
            there[there] = leaf[column[there]] < 0
            keys.append(np.unique(own[there] * size + column[there]))
    pairs = np.unique(np.concatenate(keys))
    return Boundary(pairs // size, pairs % size)


def leaf_of_rows(columns: Sequence[Ints], leaf: Ints) -> Ints:
    """The leaf that each row of a site reads; −1 where it reads none. # (rows,)"""
    if not columns or not len(leaf):
        return np.full(len(columns[0]) if columns else 0, -1, dtype=np.int64)
    inside = [np.where((c >= 0) & (leaf[np.maximum(c, 0)] >= 0), c, -1) for c in columns]
    anchor = anchors(inside, len(columns[0]))
    return np.where(anchor >= 0, leaf[np.maximum(anchor, 0)], -1)


def core_of(
    sites: Sequence[SiteForm], columns: Sequence[Sequence[Ints]], label: Ints, widths: Ints
) -> frozenset[int]:
    """The latents that are best eliminated last; none where blocks are best solved as they are.

    From the latent of the most unknowns on, each leaves the core with all latents that read it, if
    that makes the work less.

    Args:
        sites: The sites, in topological order.
        columns: As of `leaves_of`.
        label: The block of each element.
        widths: The unknown numbers of each element.
    """
    latents = [s for s, site in enumerate(sites) if site.is_latent]
    sizes = np.bincount(label, weights=widths) if len(label) else np.zeros(1)
    if len(latents) < 2 or sizes.max() <= _FEW:
        return frozenset()
    few = [_distinct(c) for c in columns if len(c) > 1]
    counts = np.array([sites[s].rows for s in latents])
    site_of = np.repeat(latents, counts)
    least = _GAIN * float((sizes**3).sum())
    core, best = frozenset(latents), frozenset[int]()
    for s in sorted(latents, key=lambda s: -sites[s].rows * sites[s].width):
        if s not in core or not sites[s].rows:
            continue
        tried = core - _readers(sites, s)
        work = _work(few, np.isin(site_of, list(tried)), label, widths)
        if work < least:
            core = best = tried
            least = work
    return best


def _readers(sites: Sequence[SiteForm], latent: int) -> set[int]:
    """A latent and all latents that read it, directly or through others."""
    found = {latent}
    for s, site in enumerate(sites):
        if site.is_latent and any(t.latent in found for t in site.terms):
            found.add(s)
    return found


def _work(columns: Sequence[Sequence[Ints]], in_core: Flags, label: Ints, widths: Ints) -> float:
    """About how many products of numbers an elimination takes."""
    core = np.bincount(label, weights=widths * in_core)
    leaf = leaves_of(columns, in_core)
    p = np.bincount(leaf[~in_core], weights=widths[~in_core])
    boundary = boundary_of(columns, leaf)
    q = np.bincount(boundary.leaf, weights=widths[boundary.element], minlength=len(p))
    schur = np.minimum(_SCATTERED * q**2, p * core.max() ** 2)
    return float((p**2 * (p + q) + schur + _MATRIX).sum() + (core**3).sum())


def _distinct(columns: Sequence[Ints]) -> list[Ints]:
    """The rows of a site that differ in what they read."""
    key, bound = np.zeros(len(columns[0]), np.int64), 1
    for column in columns:
        size = int(column.max(initial=-1)) + 2
        if bound > 2**62 // size:
            key = np.unique(key, return_inverse=True)[1].astype(np.int64)
            bound = int(key.max(initial=0)) + 1
        key, bound = key * size + column + 1, bound * size
    kept = np.unique(key, return_index=True)[1]
    return [column[kept] for column in columns]
