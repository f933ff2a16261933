"""Which unknowns of a linear-Gaussian component belong together, and where their numbers lie.

Sites are in topological order. Each has rows (the cells of its plates) and a width D (its event):

    y_s[r] = offset_s[r] + Σ_t C_{s,t}[r] h_{latent(t)}[element_t[r]] + L_s[r] ε,     ε ~ N(0, I)

where y is observed or a latent itself. Two elements of latents depend on each other a posteriori only
if some chain of rows reads both, so the connected components, here *blocks*, are solved apart. Blocks
of about one size lie in one *bucket*, as one batch of padded matrices. The matrices of all buckets
lie one after the other in one flat vector, so that any site adds to all of them at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pyro_em.posteriors.gaussians.block_search import (
    Ints,
    anchors,
    columns_of,
    components,
    padded_sizes,
    positions_in,
)
from pyro_em.posteriors.gaussians.site_forms import SiteForm


@dataclass(frozen=True, eq=False)
class Reading:
    """Where the Q coordinates that the rows of a site read lie in the flat vectors and matrices.

    Attributes:
        vector: Places in a flat vector; 0 where nothing is read. # (rows, Q)
        row: Places of the first number of their rows in the flat matrices. # (rows, Q)
        column: Columns inside those rows. # (rows, Q)
        present: False where nothing is read; None if every row reads every term. # (rows, Q)
    """

    vector: Tensor
    row: Tensor
    column: Tensor
    present: Tensor | None = None

    @property
    def size(self) -> int:
        """Q."""
        return int(self.vector.shape[1])

    def pairs(self, rows: slice = slice(None)) -> Tensor:
        """Places of all pairs of the coordinates in the flat matrices. # (rows, Q, Q)"""
        return self.row[rows].unsqueeze(-1) + self.column[rows].unsqueeze(-2)

    def beside(self, other: Reading) -> Reading:
        """These coordinates followed by those of another reading of the same rows."""
        present = None
        if self.present is not None or other.present is not None:
            present = torch.cat([_all_present(self), _all_present(other)], -1)
        return Reading(
            torch.cat([self.vector, other.vector], -1),
            torch.cat([self.row, other.row], -1),
            torch.cat([self.column, other.column], -1),
            present,
        )


@dataclass(frozen=True, eq=False)
class Members:
    """The elements of one latent that lie in one bucket.

    Attributes:
        site: The number of the latent's site.
        elements: Which ones; None if all of them. # (n,)
        positions: The column of each element's first coordinate in its block. # (n,)
        parents: For each term the elements read, by their rank among the parent's members of the
            bucket; None for a term that none of these elements reads. # (n,) each
    """

    site: int
    elements: Tensor | None
    positions: Tensor
    parents: tuple[Tensor | None, ...]


@dataclass(frozen=True, eq=False)
class Bucket:
    """Blocks whose matrices are padded to one size.

    Attributes:
        first: The number of its first block.
        count: B, the blocks.
        size: d, the rows and columns of each matrix.
        vector: Where its vectors lie in the flat vector; B·d places.
        matrix: Where its matrices lie in the flat matrices; B·d·d places.
        members: Its elements, latent by latent in topological order.
        order: For each row of the batch of matrices its place among the members' coordinates, one
            latent after the other; the place after the last for padding. # (B * d,)
    """

    first: int
    count: int
    size: int
    vector: slice
    matrix: slice
    members: tuple[Members, ...]
    order: Tensor


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

    @property
    def largest(self) -> int:
        """Unknown numbers of the largest block."""
        return max((bucket.size for bucket in self.buckets), default=0)

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
    def of(sites: Sequence[SiteForm], device: torch.device | None = None) -> BlockLayout:
        """The blocks of some sites.

        Args:
            sites: The sites, in topological order.
            device: Where the places are needed; by default where the terms' elements lie.

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
        return _layout(tuple(sites), device)


def _layout(sites: tuple[SiteForm, ...], device: torch.device | None) -> BlockLayout:
    if device is None:
        elements = [term.elements for site in sites for term in site.terms]
        device = elements[0].device if elements else torch.device("cpu")
    counts = [site.rows if site.is_latent else 0 for site in sites]
    first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    widths = np.repeat([site.width for site in sites], counts).astype(np.int64)
    columns = [columns_of(s, sites, first) for s in range(len(sites))]
    label = components(columns, int(first[-1]))

    blocks = int(label.max()) + 1 if len(label) else 0
    sizes = np.bincount(label, weights=widths, minlength=blocks).astype(np.int64)
    padded = padded_sizes(sizes)
    by_size = np.argsort(padded, kind="stable")  # blocks are numbered anew, bucket by bucket
    renumbered = np.empty_like(by_size)
    renumbered[by_size] = np.arange(blocks)
    sizes, padded, label = sizes[by_size], padded[by_size], renumbered[label]
    vector_end, matrix_end = np.cumsum(padded), np.cumsum(padded**2)
    vector_begin, matrix_begin = vector_end - padded, matrix_end - padded**2

    position = positions_in(label, widths)
    places = _Places(
        vector_begin[label] + position,
        matrix_begin[label] + position * padded[label],
        position,
        padded[label],
    )
    reads = tuple(
        _reading(places, c[: len(site.terms)], [sites[t.latent].width for t in site.terms], device)
        if site.terms
        else _nothing(site.rows, device)
        for site, c in zip(sites, columns, strict=True)
    )
    own = tuple(
        _reading(places, [c[-1]], [site.width], device) if site.is_latent else None
        for site, c in zip(sites, columns, strict=True)
    )
    block_of_row = tuple(
        torch.as_tensor(_blocks_of(site, c, label), device=device)
        for site, c in zip(sites, columns, strict=True)
    )
    return BlockLayout(
        sites,
        blocks,
        torch.as_tensor(sizes, device=device),
        _buckets(sites, first, label, padded, places, device),
        reads,
        own,
        block_of_row,
        int(padded.sum()),
        int((padded**2).sum()),
    )


@dataclass(frozen=True, eq=False)
class _Places:
    """Places of each element's first coordinate, and how far apart rows of its matrix are."""

    vector: Ints
    row: Ints
    column: Ints
    stride: Ints


def _reading(
    places: _Places, columns: list[Ints], widths: list[int], device: torch.device
) -> Reading:
    vector, row, column, present = [], [], [], []
    for elements, width in zip(columns, widths, strict=True):
        is_read = (elements >= 0)[:, None]
        k = np.arange(width)
        e = np.maximum(elements, 0)
        if not len(places.vector):
            raise ValueError("A term reads a latent without elements.")
        vector.append(np.where(is_read, places.vector[e][:, None] + k, 0))
        row.append(np.where(is_read, places.row[e][:, None] + places.stride[e][:, None] * k, 0))
        column.append(np.where(is_read, places.column[e][:, None] + k, 0))
        present.append(np.broadcast_to(is_read, (len(elements), width)))
    there = np.concatenate(present, 1)
    return Reading(
        torch.as_tensor(np.concatenate(vector, 1), device=device),
        torch.as_tensor(np.concatenate(row, 1), device=device),
        torch.as_tensor(np.concatenate(column, 1), device=device),
        None if there.all() else torch.as_tensor(there, device=device),
    )


def _nothing(rows: int, device: torch.device) -> Reading:
    none = torch.zeros(rows, 0, dtype=torch.long, device=device)
    return Reading(none, none, none)


def _all_present(reading: Reading) -> Tensor:
    if reading.present is not None:
        return reading.present
    return torch.ones_like(reading.vector, dtype=torch.bool)


def _blocks_of(site: SiteForm, columns: list[Ints], label: Ints) -> Ints:
    anchor = anchors(columns, site.rows)
    if not len(label):
        return anchor
    return np.where(anchor >= 0, label[np.maximum(anchor, 0)], -1)


def _buckets(
    sites: tuple[SiteForm, ...],
    first: Ints,
    label: Ints,
    padded: Ints,
    places: _Places,
    device: torch.device,
) -> tuple[Bucket, ...]:
    block_begin = vector_begin = matrix_begin = 0
    out = []
    for size in np.unique(padded):
        size, count = int(size), int((padded == size).sum())
        members: list[Members] = []
        rank: dict[int, Ints] = {}  # of each element of a latent among the bucket's
        order = np.full(count * size, -1, dtype=np.int64)
        coordinates = 0
        for s, site in enumerate(sites):
            if not site.is_latent:
                continue
            everything = slice(int(first[s]), int(first[s + 1]))
            inside = padded[label[everything]] == size
            elements = np.flatnonzero(inside)
            if not len(elements):
                continue
            rank[s] = np.cumsum(inside) - 1
            here = first[s] + elements
            parents: list[Tensor | None] = []
            for term in site.terms:
                read = term.elements.detach().cpu().numpy()[elements]
                if (read < 0).all():
                    parents.append(None)
                    continue
                # A missing read takes any row: its coefficients are zero.
                ranks = np.where(read >= 0, rank[term.latent][np.maximum(read, 0)], 0)
                parents.append(torch.as_tensor(ranks, device=device))
            k = np.arange(site.width)
            at = places.vector[here][:, None] - vector_begin + k
            order[at.reshape(-1)] = coordinates + np.arange(at.size)
            coordinates += at.size
            members.append(
                Members(
                    s,
                    None if inside.all() else torch.as_tensor(elements, device=device),
                    torch.as_tensor(places.column[here], device=device),
                    tuple(parents),
                )
            )
        order[order < 0] = coordinates
        out.append(
            Bucket(
                block_begin,
                count,
                size,
                slice(vector_begin, vector_begin + count * size),
                slice(matrix_begin, matrix_begin + count * size * size),
                tuple(members),
                torch.as_tensor(order, device=device),
            )
        )
        block_begin += count
        vector_begin += count * size
        matrix_begin += count * size * size
    return tuple(out)
