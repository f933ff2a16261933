"""Which unknowns of a linear-Gaussian component belong together, and where their numbers lie.

Sites are in topological order. Each has rows (the cells of its plates) and a width D (its event):

    y_s[r] = offset_s[r] + Σ_t C_{s,t}[r] h_{latent(t)}[element_t[r]] + L_s[r] ε,     ε ~ N(0, I)

where y is observed or a latent itself. Two elements of latents depend on each other a posteriori only
if some chain of rows reads both, so the connected components, here *blocks*, are solved apart. Blocks
of about one size lie in one *bucket*, as one batch of padded matrices. The matrices of all buckets
lie one after the other in one flat vector, so that any site adds to all of them at once.

A large block that falls apart without a few latents is a dense *core* and *leaves*, which are
eliminated first: `leaf_search` says which, `block_places` how they lie.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from pyro_em.posteriors.gaussians.block_laying import Numbered, Places, members_of, reading_of
from pyro_em.posteriors.gaussians.block_places import Bucket, Leaves, Reading
from pyro_em.posteriors.gaussians.block_search import (
    Ints,
    anchors,
    columns_of,
    components,
    padded_sizes,
    positions_in,
)
from pyro_em.posteriors.gaussians.leaf_layout import leaves_beside
from pyro_em.posteriors.gaussians.leaf_search import core_of, leaf_of_rows
from pyro_em.posteriors.gaussians.site_forms import SiteForm


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """The blocks of a linear-Gaussian component.

    Attributes:
        sites: The sites, in topological order.
        blocks: Number of blocks.
        block_sizes: Unknown numbers of each block. # (blocks,)
        buckets: Blocks by padded size, in the order of the blocks' numbers.
        reads: What each site's mean reads, terms in order.
        own: Of each latent its own coordinates; None for observed sites.
        block_of_row: For each site the block of each row; −1 where a row reads nothing. # (rows,) each
        vector_size: Length of a flat vector.
        matrix_size: Length of the flat matrices.
        leaves: What is eliminated before the `buckets`, which are then about the core alone.
        leaf_of_row: For each site the leaf of each row; −1 where a row reads none. # (rows,) each
    """

    sites: tuple[SiteForm, ...]
    blocks: int
    block_sizes: Tensor
    buckets: tuple[Bucket, ...]
    reads: tuple[Reading, ...]
    own: tuple[Reading | None, ...]
    block_of_row: tuple[Tensor, ...]
    vector_size: int
    matrix_size: int
    leaves: tuple[Leaves, ...] = ()
    leaf_of_row: tuple[Tensor, ...] = ()

    @cached_property
    def largest(self) -> int:
        """Unknown numbers of the largest block."""
        if self.leaves:
            return int(self.block_sizes.max())
        return max((bucket.size for bucket in self.buckets), default=0)

    @property
    def core(self) -> int:
        """Unknown numbers of the largest matrix of a core; 0 where there are no leaves."""
        return max((bucket.size for bucket in self.buckets), default=0) if self.leaves else 0

    @property
    def core_size(self) -> int:
        """Length of the flat vector of what the `buckets` are about."""
        return sum(bucket.count * bucket.size for bucket in self.buckets)

    @property
    def device(self) -> torch.device:
        """Where its places lie."""
        return self.block_sizes.device

    def block_of_element(self, latent: int) -> Tensor:
        """The block of each element of a latent. # (n,)

        Args:
            latent: The number of its site.
        """
        if not self.sites[latent].is_latent:
            raise ValueError(
                f"{self.sites[latent].name!r} is observed: it has no elements in blocks."
            )
        return self.block_of_row[latent]

    @staticmethod
    def of(
        sites: Sequence[SiteForm],
        device: torch.device | None = None,
        core: Collection[int] | None = None,
    ) -> BlockLayout:
        """The blocks of some sites.

        Args:
            sites: The sites, in topological order.
            device: Where the places are needed; by default where the terms' elements lie.
            core: The latents that are eliminated last, with all latents that they read: none where
                blocks shall be dense. By default whatever is least work.

        Raises:
            ValueError: If a site reads what is no latent before it, or an element that is not there.

        Example:
            >>> from pyro_em.posteriors.gaussians.site_forms import Term
            >>> group = SiteForm("group", rows=2, width=1, is_latent=True)
            >>> read = Term(0, torch.tensor([0, 0, 1]))
            >>> data = SiteForm("data", rows=3, width=1, is_latent=False, terms=(read,))
            >>> layout = BlockLayout.of([group, data])
            >>> layout.blocks, layout.largest, layout.block_of_row[1].tolist()
            (2, 1, [0, 0, 1])
        """
        return _layout(tuple(sites), device, core)


def _layout(
    sites: tuple[SiteForm, ...], device: torch.device | None, core: Collection[int] | None
) -> BlockLayout:
    if device is None:
        elements = [term.elements for site in sites for term in site.terms]
        device = elements[0].device if elements else torch.device("cpu")
    counts = [site.rows if site.is_latent else 0 for site in sites]
    first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    widths = np.repeat([site.width for site in sites], counts).astype(np.int64)
    columns = [columns_of(s, sites, first) for s in range(len(sites))]
    label = components(columns, int(first[-1]))
    chosen = core_of(sites, columns, label, widths) if core is None else frozenset(core)
    if all(s in chosen for s, site in enumerate(sites) if site.is_latent and site.rows):
        chosen = frozenset()  # nothing comes before it
    in_core = np.repeat([not chosen or s in chosen for s in range(len(sites))], counts)

    blocks = int(label.max()) + 1 if len(label) else 0
    sizes = np.bincount(label, weights=widths, minlength=blocks).astype(np.int64)
    own = widths * in_core
    # A block without a core has one of padding, so that every block has its place.
    padded = padded_sizes(np.bincount(label, weights=own, minlength=blocks).astype(np.int64))
    padded = np.maximum(padded, 1)
    by_size = np.argsort(padded, kind="stable")  # blocks are numbered anew, bucket by bucket
    renumbered = np.empty_like(by_size)
    renumbered[by_size] = np.arange(blocks)
    sizes, padded, label = sizes[by_size], padded[by_size], renumbered[label]
    vector_begin = np.cumsum(padded) - padded
    matrix_begin = np.cumsum(padded**2) - padded**2

    position = np.zeros_like(label)
    position[in_core] = positions_in(label[in_core], widths[in_core])
    places = Places(
        vector_begin[label] + position,
        matrix_begin[label] + position * padded[label],
        position,
        padded[label],
    )
    ends = int(padded.sum()), int((padded**2).sum())
    numbered = Numbered(sites, first, in_core)
    groups = [(int(size), int((padded == size).sum())) for size in np.unique(padded)]
    buckets, begin = [], [0, 0, 0]
    for size, count in groups:
        inside = in_core & (padded[label] == size)
        members, order = members_of(numbered, places, inside, begin[1], count * size, device)
        vector = slice(begin[1], begin[1] + count * size)
        matrix = slice(begin[2], begin[2] + count * size * size)
        buckets.append(Bucket(begin[0], count, size, vector, matrix, members, order))
        begin = [begin[0] + count, vector.stop, matrix.stop]

    leaves: tuple[Leaves, ...] = ()
    beside = None
    if chosen:
        leaves, beside = leaves_beside(numbered, columns, widths, label, places, ends, device)
        last = leaves[-1]
        ends = last.vector.stop, last.matrix.stop
    kinds = [not chosen or s in chosen for s in range(len(sites))]
    reads, of_latents = [], []
    for s, (site, c) in enumerate(zip(sites, columns, strict=True)):
        latents = [t.latent for t in site.terms]
        terms = [(c[i], sites[t].width, kinds[t]) for i, t in enumerate(latents)]
        own_terms = [(c[-1], site.width, kinds[s])] if site.is_latent else []
        leaf = None
        if beside is not None and not all(k for _, _, k in (*terms, *own_terms)):
            leaf = leaf_of_rows(c, beside.leaf)
        reads.append(reading_of(places, terms, beside, leaf, site.rows, device))
        of_latents.append(
            reading_of(places, own_terms, beside, leaf, site.rows, device) if own_terms else None
        )
    block_of_row = tuple(
        torch.as_tensor(_blocks_of(site, c, label), device=device)
        for site, c in zip(sites, columns, strict=True)
    )
    leaf_of = () if beside is None else [leaf_of_rows(c, beside.leaf) for c in columns]
    return BlockLayout(
        sites,
        blocks,
        torch.as_tensor(sizes, device=device),
        tuple(buckets),
        tuple(reads),
        tuple(of_latents),
        block_of_row,
        *ends,
        leaves,
        tuple(torch.as_tensor(leaf, device=device) for leaf in leaf_of),
    )


def _blocks_of(site: SiteForm, columns: list[Ints], label: Ints) -> Ints:
    anchor = anchors(columns, site.rows)
    if not len(label):
        return anchor
    return np.where(anchor >= 0, label[np.maximum(anchor, 0)], -1)
