"""What rows read of the unknowns of all blocks, which lie one after the other in flat memory.

A vector holds the unknowns of all blocks; a matrix the entries of all their square matrices. Reads are
gathered from them at the places of a `Reading`, and what rows say is added back at the same places.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pyro_em.posteriors.gaussians.block_places import Reading, places_between, places_of
from pyro_em.posteriors.gaussians.gaussian_layout import BlockLayout


def read_at(flat: Tensor, reading: Reading) -> Tensor:
    """What rows read of a flat vector. # (cells, rows, Q)"""
    out = flat[:, reading.vector]
    if reading.present is None:
        return out
    return torch.where(reading.present, out, torch.zeros_like(out))


def pairs_at(flat: Tensor, a: Reading, b: Reading) -> Tensor:
    """What rows read of the flat matrices. # (cells, rows, Q_a, Q_b)"""
    if a.common is None or b.common is None:
        out = flat[:, places_of(a, b)]
    else:  # what all rows read alike is read once
        out = flat.new_empty(len(flat), len(a.vector), a.size, b.size)
        for i in a.runs:
            for j in b.runs:
                rows = slice(0, 1) if i.common and j.common else slice(None)
                out[:, :, i.own, j.own] = flat[:, places_between(a, i, b, j, rows)]
    if a.present is not None:
        out = torch.where(a.present.unsqueeze(-1), out, torch.zeros_like(out))
    if b.present is not None:
        out = torch.where(b.present.unsqueeze(-2), out, torch.zeros_like(out))
    return out


def read_centres(layout: BlockLayout, site: int, centre: Sequence[Tensor | None]) -> Tensor:
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


def read_values(
    layout: BlockLayout, site: int, values: Mapping[int, Tensor], none: Tensor
) -> Tensor:
    """What the rows of a site read of values of all latents; zero where they read nothing.

    Args:
        layout: Blocks and places.
        site: The number of the site.
        values: Of each latent. # (..., n, q)
        none: What rows read that read no latent. # (..., rows, 0)

    Returns:
        # (..., rows, Q)
    """
    parts = [none]
    for term in layout.sites[site].terms:
        part = values[term.latent][..., term.elements.clamp(min=0), :]
        there = (term.elements >= 0).unsqueeze(-1)
        parts.append(torch.where(there, part, torch.zeros_like(part)))
    return torch.cat(parts, -1)


def read_covariances(
    layout: BlockLayout, site: int, covariances: Mapping[int, Tensor], like: Tensor
) -> Tensor:
    """The covariance of what the rows of a site read, where elements are independent.

    Args:
        layout: Blocks and places.
        site: The number of the site.
        covariances: Of each element of each latent. # (n, q, q) each
        like: A tensor of the dtype and on the device of the result.

    Returns:
        # (rows, Q, Q)
    """
    form = layout.sites[site]
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
                row.append(like.new_zeros(form.rows, *shape))
        blocks.append(torch.cat(row, -1))
    return torch.cat(blocks, -2) if blocks else like.new_zeros(form.rows, 0, 0)


def added(target: Tensor, places: Tensor, x: Tensor) -> Tensor:
    """The target with x added at places along its last dimension, the same for each cell.

    One flat index_add for all cells: along a dimension it goes number by number.
    """
    cells, size = target.shape
    x = x.expand(cells, *x.shape[1:]).reshape(-1)
    places = places.reshape(1, -1)
    if cells > 1:
        places = torch.arange(cells, device=places.device).unsqueeze(-1) * size + places
    return target.reshape(-1).index_add(0, places.reshape(-1), x).reshape(cells, size)
