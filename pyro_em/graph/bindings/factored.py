"""Jacobians of many rows, read with few vectors and held without their zeros.

Which elements of a parameter a cell reads, a vector on the rows of that cell tells, Jᵀ v. Elements that
no cell reads together are then probed together: J t with a one for each of them has in every cell the
slope of the only one that it reads.

Source: Curtis, Powell and Reid (1974), on the estimation of sparse Jacobian matrices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_em.graph.bindings.jacobian import Jacobian
from pyro_em.graph.bindings.nodes import Point, forward_maps
from pyro_em.tracing.without_sympy import pull_back

_MANY_CELLS = 256  # behind the rows, each of which costs a pass


def factored(
    point: Point, top: Tensor, leaf: Tensor, like: Tensor, plates: int, max_cells: int
) -> Jacobian | None:
    """The Jacobian of a linear map without its zeros; None where that holds no less than all of it.

    Args:
        point: Where the map ends in its autograd graph.
        top: Which element of it each cell is. # (*plates, *rest)
        leaf: Where it begins.
        like: For dtype and device. # (*plates, *rest)
        plates: How many dimensions are plates; the longest of them is that of the rows.
        max_cells: How many numbers may be held.
    """
    if not plates:
        return None
    along = max(range(plates), key=lambda d: top.shape[d])
    places = top.movedim(along, 0).reshape(top.shape[along], -1)  # (rows, cells)
    size, cells = leaf.numel(), places.shape[1]
    if not 1 < cells <= _MANY_CELLS:
        return None
    reads = torch.stack([_read(point, leaf, places[:, c], like) for c in range(cells)])
    colours = _coloured(reads)
    width = max(colours, default=-1) + 1
    if 2 * width > size:
        return None
    forward = forward_maps(point.edge, point.shape, leaf, like)
    index = torch.zeros(cells, width, dtype=torch.long, device=top.device)
    slopes, held = [], 0
    for colour in range(width):
        probe = torch.zeros(size, dtype=leaf.dtype, device=leaf.device)
        for p in (p for p, own in enumerate(colours) if own == colour):
            probe[p] = 1
            index[reads[:, p], colour] = p
        slopes.append(once(forward(probe.reshape(leaf.shape)).reshape(-1)[top]))
        held += slopes[-1].numel()
        if held > max_cells:
            return None
    value = torch.stack(torch.broadcast_tensors(*slopes), -1)
    rest = [n for d, n in enumerate(top.shape) if d != along]
    laid = index.reshape(*rest, width).unsqueeze(along)
    shape = (*top.shape, width)
    return Jacobian(value.expand(shape), laid.expand(shape), size)


def _read(point: Point, leaf: Tensor, places: Tensor, like: Tensor) -> Tensor:
    """Which elements of a parameter any of some places reads. # (leaf.numel(),)"""
    noise = torch.rand(len(places), generator=torch.Generator().manual_seed(37)) + 0.5
    v = torch.zeros(point.shape, dtype=like.dtype, device=like.device)
    v.view(-1)[places] = noise.to(v)
    found = pull_back(point.edge, leaf, v, allow_unused=True)
    return torch.zeros_like(leaf).bool().reshape(-1) if found is None else (found != 0).reshape(-1)


def _coloured(reads: Tensor) -> list[int]:
    """Colours of elements, of which no two that a cell reads have the same; −1 where none reads.

    Args:
        reads: # (cells, elements)
    """
    taken: list[set[int]] = [set() for _ in range(len(reads))]
    out = []
    for column in reads.T.cpu():
        cells = column.nonzero().reshape(-1).tolist()
        used = set().union(*(taken[c] for c in cells))
        colour = next(i for i in range(len(used) + 1) if i not in used) if cells else -1
        for c in cells:
            taken[c].add(colour)
        out.append(colour)
    return out


def once(t: Tensor) -> Tensor:
    """A tensor of its own that holds once what is the same along a dimension."""
    for d in range(t.dim()):
        if t.shape[d] > 1 and bool((t.narrow(d, 0, 1) == t).all()):
            t = t.narrow(d, 0, 1)
    return t.clone()
