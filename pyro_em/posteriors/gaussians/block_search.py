"""Which elements of latents belong together: the connected components of what rows read.

Elements of all latents are numbered through. Two of them depend on each other a posteriori only if some
chain of rows reads both, so that components, or *blocks*, are solved apart. Blocks of about one size
are padded to one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pyro_em.posteriors.gaussians.site_forms import SiteForm

Ints = NDArray[np.int64]


def columns_of(s: int, sites: Sequence[SiteForm], first: Ints) -> list[Ints]:
    """The elements that each row of a site reads, numbered through all latents; its own last."""
    site = sites[s]
    out = []
    for term in site.terms:
        if not (0 <= term.latent < s and sites[term.latent].is_latent):
            raise ValueError(f"{site.name!r} must only read latents that come before it.")
        elements = term.elements.detach().cpu().numpy().astype(np.int64)
        if elements.shape != (site.rows,):
            raise ValueError(
                f"{site.name!r} has {site.rows} rows, but a term of it has elements of shape "
                f"{elements.shape}."
            )
        if elements.size and (elements.min() < -1 or elements.max() >= sites[term.latent].rows):
            raise ValueError(
                f"{site.name!r} reads elements {elements.min()} … {elements.max()} of "
                f"{sites[term.latent].name!r}, which has {sites[term.latent].rows}."
            )
        out.append(np.where(elements >= 0, elements + first[term.latent], -1))
    if site.is_latent:
        out.append(first[s] + np.arange(site.rows))
    return out


def anchors(columns: list[Ints], rows: int) -> Ints:
    """For each row one element that it reads; −1 if there is none."""
    out = np.full(rows, -1, dtype=np.int64)
    for column in columns:
        out = np.where(out < 0, column, out)
    return out


def components(columns: list[list[Ints]], elements: int) -> Ints:
    """The connected component of each element, in the order of their first elements."""
    here, there = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for site in columns:
        if len(site) < 2:
            continue
        anchor = anchors(site, len(site[0]))
        for column in site:
            linked = (column >= 0) & (column != anchor)
            here.append(anchor[linked])
            there.append(column[linked])
    a, b = np.concatenate(here), np.concatenate(there)
    label = np.arange(elements, dtype=np.int64)
    if not len(a):
        return label
    # Each component is named after its least element so far. A name that meets a smaller one leads
    # to it, so that every round leaves at most half of the names that are not final.
    while bool((label[a] != label[b]).any()):
        low = np.minimum(label[a], label[b])
        leads = label.copy()
        np.minimum.at(leads, label[a], low)
        np.minimum.at(leads, label[b], low)
        while bool((leads[leads] != leads).any()):
            leads = leads[leads]  # twice as far
        label = leads[label]
    return np.unique(label, return_inverse=True)[1].astype(np.int64)


def padded_sizes(sizes: Ints) -> Ints:
    """The size to which each block is padded: few different ones, each that of a block."""
    out = sizes.copy()
    if len(np.unique(sizes)) <= 8:
        return out
    # Steps of 2^(1/4): matrices grow by at most about two fifths, and mostly by less.
    steps = np.ceil(4 * np.log2(np.maximum(sizes, 1))).astype(np.int64)
    for step in np.unique(steps):
        members = steps == step
        out[members] = sizes[members].max()
    return out


def positions_in(label: Ints, widths: Ints) -> Ints:
    """The place of each element's first coordinate in its block: elements in topological order."""
    order = np.argsort(label, kind="stable")
    before = np.cumsum(widths[order]) - widths[order]
    sorted_label = label[order]
    is_first = np.ones(len(order), dtype=bool)
    is_first[1:] = sorted_label[1:] != sorted_label[:-1]
    start = before[is_first]
    rank = np.cumsum(is_first) - 1
    out = np.empty_like(before)
    out[order] = before - start[rank] if len(order) else before
    return out
