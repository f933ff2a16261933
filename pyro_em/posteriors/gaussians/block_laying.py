"""Blocks laid out in flat memory: what rows read, and the members of a batch of matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_em.posteriors.gaussians.block_places import Members, Reading
from pyro_em.posteriors.gaussians.block_search import Ints
from pyro_em.posteriors.gaussians.leaf_search import Boundary
from pyro_em.posteriors.gaussians.site_forms import SiteForm

_MANY = 64  # rows from which on it is worth knowing what they have in common


@dataclass(frozen=True, eq=False)
class Places:
    """Places of each element's first coordinate, and how far apart rows of its matrix are."""

    vector: Ints
    row: Ints
    column: Ints
    stride: Ints


@dataclass(frozen=True, eq=False)
class Numbered:
    """The sites with their elements, numbered through all latents.

    Attributes:
        sites: In topological order.
        first: The number of each site's first element.
        in_core: Of each element, whether it is in the core.
    """

    sites: tuple[SiteForm, ...]
    first: Ints
    in_core: NDArray[np.bool_]

    def elements(self, s: int) -> slice:
        """Those of one latent."""
        return slice(int(self.first[s]), int(self.first[s + 1]))


@dataclass(frozen=True, eq=False)
class Beside:
    """What leaves read of the core.

    Attributes:
        leaf: The leaf of each element; −1 in the core. # (elements,)
        boundary: The pairs of leaves and elements of the core.
        column: The first column of each pair in the leaf's rows. # (pairs,)
    """

    leaf: Ints
    boundary: Boundary
    column: Ints

    def columns(self, leaf: Ints, element: Ints) -> Ints:
        """The first column of elements of the core in the rows of leaves; 0 where either is −1."""
        there = (leaf >= 0) & (element >= 0)
        out = np.zeros_like(element)
        out[there] = self.column[self.boundary.find(leaf[there], element[there])]
        return out


def reading_of(
    places: Places,
    terms: Sequence[tuple[Ints, int, bool]],
    beside: Beside | None,
    leaf: Ints | None,
    rows: int,
    device: torch.device,
) -> Reading:
    """Where what the rows of a site read lies.

    Args:
        places: Of each element.
        terms: The elements, −1 where none, their width, and whether they are in the core.
        beside: What leaves read of the core.
        leaf: The leaf of each row, where some rows read leaves. # (rows,)
        rows: How many rows there are.
        device: Where the places are needed.
    """
    if not terms:
        none = torch.zeros(rows, 0, dtype=torch.long, device=device)
        return Reading(none, none, none)
    vector, row, column, present, inner = [], [], [], [], []
    kinds: list[bool] = []
    for elements, width, in_core in terms:
        is_read = (elements >= 0)[:, None]
        k = np.arange(width)
        e = np.maximum(elements, 0)
        if not len(places.vector):
            raise ValueError("A term reads a latent without elements.")
        own = np.where(is_read, places.column[e][:, None] + k, 0)
        vector.append(np.where(is_read, places.vector[e][:, None] + k, 0))
        row.append(np.where(is_read, places.row[e][:, None] + places.stride[e][:, None] * k, 0))
        present.append(np.broadcast_to(is_read, (len(elements), width)))
        inner.append(own)
        if in_core and leaf is not None and beside is not None:
            own = np.where(is_read, beside.columns(leaf, elements)[:, None] + k, 0)
        column.append(own)
        kinds += [in_core] * width
    there, at = np.concatenate(present, 1), np.concatenate(vector, 1)
    common = (at == at[:1]).all(0) & there.all(0) if rows > _MANY else np.zeros(1, bool)
    mixed = leaf is not None and any(kinds)
    return Reading(
        torch.as_tensor(at, device=device),
        torch.as_tensor(np.concatenate(row, 1), device=device),
        torch.as_tensor(np.concatenate(column, 1), device=device),
        None if there.all() else torch.as_tensor(there, device=device),
        tuple(kinds) if mixed else None,
        torch.as_tensor(np.concatenate(inner, 1), device=device) if mixed else None,
        tuple(common.tolist()) if common.any() else None,
    )


def members_of(
    numbered: Numbered,
    places: Places,
    inside: NDArray[np.bool_],
    begin: int,
    size: int,
    device: torch.device,
    beside: Beside | None = None,
) -> tuple[tuple[Members, ...], Tensor]:
    """The elements of a bucket, latent by latent, and the order of its rows.

    Args:
        numbered: The sites with their elements.
        places: Of each element.
        inside: Which elements are in the bucket.
        begin: Where its vectors begin.
        size: Their length.
        device: Where the places are needed.
        beside: What leaves read of the core, for leaves.
    """
    members: list[Members] = []
    rank: dict[int, Ints] = {}  # of each element of a latent among the bucket's
    order = np.full(size, -1, dtype=np.int64)
    coordinates = 0
    for s, site in enumerate(numbered.sites):
        everything = numbered.elements(s)
        own = inside[everything]
        elements = np.flatnonzero(own)
        if not site.is_latent or not len(elements):
            continue
        rank[s] = np.cumsum(own) - 1
        here = everything.start + elements
        parents: list[Tensor | None] = []
        columns: list[Tensor | None] = []
        for term in site.terms:
            read = term.elements.detach().cpu().numpy()[elements]
            parent = column = None
            if (read >= 0).any():
                parent_core = numbered.in_core[numbered.elements(term.latent)].any()
                if beside is not None and parent_core:
                    at = np.where(read >= 0, read + numbered.first[term.latent], -1)
                    column = beside.columns(beside.leaf[here], at)
                else:
                    # A missing read takes any row: its coefficients are zero.
                    parent = np.where(read >= 0, rank[term.latent][np.maximum(read, 0)], 0)
            parents.append(None if parent is None else torch.as_tensor(parent, device=device))
            columns.append(None if column is None else torch.as_tensor(column, device=device))
        k = np.arange(site.width)
        at = places.vector[here][:, None] - begin + k
        order[at.reshape(-1)] = coordinates + np.arange(at.size)
        coordinates += at.size
        members.append(
            Members(
                s,
                None if own.all() else torch.as_tensor(elements, device=device),
                torch.as_tensor(places.column[here], device=device),
                tuple(parents),
                tuple(columns),
            )
        )
    order[order < 0] = coordinates
    return tuple(members), torch.as_tensor(order, device=device)
