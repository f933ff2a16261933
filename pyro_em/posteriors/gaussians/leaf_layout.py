"""The leaves of large blocks, laid out in flat memory after the matrices of the core."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from pyro_em.posteriors.gaussians.block_laying import Beside, Numbered, Places, members_of
from pyro_em.posteriors.gaussians.block_places import Leaves, Reading
from pyro_em.posteriors.gaussians.block_search import Ints, padded_sizes, positions_in
from pyro_em.posteriors.gaussians.leaf_search import boundary_of, leaves_of


def leaves_beside(
    numbered: Numbered,
    columns: Sequence[Sequence[Ints]],
    widths: Ints,
    label: Ints,
    places: Places,
    ends: tuple[int, int],
    device: torch.device,
) -> tuple[tuple[Leaves, ...], Beside]:
    """The leaves in batches, and what they read of the core; writes the places of their elements.

    Args:
        numbered: The sites with their elements.
        columns: The elements that each row of each site reads, its own last.
        widths: Of each element.
        label: The block of each element.
        places: Of each element; those of the core are known.
        ends: Where the core's vectors and matrices end.
        device: Where the places are needed.
    """
    in_core = numbered.in_core
    leaf = leaves_of(columns, in_core)
    boundary = boundary_of(columns, leaf)
    outside = np.flatnonzero(~in_core)
    count = int(leaf.max(initial=-1)) + 1
    p = padded_sizes(np.bincount(leaf[outside], weights=widths[outside]).astype(np.int64))
    of_pairs = widths[boundary.element]
    reads = np.bincount(boundary.leaf, weights=of_pairs, minlength=count).astype(np.int64)
    q = np.where(reads > 0, padded_sizes(reads), 0)
    block = np.zeros(count, np.int64)
    block[leaf[outside]] = label[outside]
    # Leaves of the largest core are apart from all others: it is one matrix for all of them.
    is_main = block == _largest(label[in_core], widths[in_core])
    forms, form = np.unique(np.stack([p, q, is_main], 1), axis=0, return_inverse=True)
    form = form.reshape(-1)

    by_form = np.argsort(form, kind="stable")  # leaves are numbered anew, batch by batch
    renumbered = np.empty_like(by_form)
    renumbered[by_form] = np.arange(count)
    p, q, block, form = p[by_form], q[by_form], block[by_form], form[by_form]
    leaf[outside] = renumbered[leaf[outside]]
    boundary = boundary_of(columns, leaf)
    of_pairs = widths[boundary.element]
    before = np.cumsum(of_pairs) - of_pairs
    starts = np.searchsorted(boundary.leaf, boundary.leaf)  # each leaf's first pair
    beside = Beside(leaf, boundary, p[boundary.leaf] + before - before[starts])

    stride = p + q
    position = positions_in(leaf[outside], widths[outside])
    own = leaf[outside]
    vector = ends[0] + np.cumsum(p) - p
    matrix = ends[1] + np.cumsum(p * stride) - p * stride
    places.vector[outside] = vector[own] + position
    places.row[outside] = matrix[own] + position * stride[own]
    places.column[outside] = position
    places.stride[outside] = stride[own]

    out, first, vector_begin, matrix_begin = [], 0, *ends
    for i, (size, width, main) in enumerate(forms.tolist()):
        own_leaves = np.flatnonzero(form == i)
        n = len(own_leaves)
        inside = np.zeros_like(in_core)
        inside[outside] = form[own] == i
        members, order = members_of(
            numbered, places, inside, vector_begin, n * size, device, beside
        )
        edge = _edge(beside, slice(first, first + n), size, width, widths, places, device)
        of_core = None
        if main and width:
            e = boundary.element[starts[boundary.leaf == first][0]]
            d = int(places.stride[e])
            begin = int(places.row[e] - places.column[e] * d)
            of_core = slice(begin, begin + d * d)
        is_all = of_core is not None and of_core.stop - of_core.start == width * width
        every = torch.arange(width, device=device)
        out.append(
            Leaves(
                first,
                n,
                size,
                slice(vector_begin, vector_begin + n * size),
                slice(matrix_begin, matrix_begin + n * size * (size + width)),
                members,
                order,
                reads=width,
                block=torch.as_tensor(block[own_leaves], device=device),
                boundary=edge,
                matrix_of_core=of_core,
                is_whole=is_all and bool((edge.column == every).all()),
            )
        )
        first += n
        vector_begin += n * size
        matrix_begin += n * size * (size + width)
    return tuple(out), beside


def _edge(
    beside: Beside,
    leaves: slice,
    size: int,
    width: int,
    widths: Ints,
    places: Places,
    device: torch.device,
) -> Reading:
    """Places of the coordinates of the core that some leaves read. # (J, q)

    Padding repeats a leaf's first: its coefficients are zero.
    """
    pairs = np.flatnonzero(
        (beside.boundary.leaf >= leaves.start) & (beside.boundary.leaf < leaves.stop)
    )
    element = beside.boundary.element[pairs]
    w = widths[element]
    k = np.arange(int(w.sum())) - np.repeat(np.cumsum(w) - w, w)
    pairs, element = np.repeat(pairs, w), np.repeat(element, w)
    at = beside.boundary.leaf[pairs] - leaves.start, beside.column[pairs] - size + k
    found = []
    for x in (
        places.vector[element] + k,
        places.row[element] + places.stride[element] * k,
        places.column[element] + k,
    ):
        out = np.full((leaves.stop - leaves.start, width), -1, dtype=np.int64)
        out[at] = x
        if width:
            out = np.where(out < 0, out[:, :1], out)
        found.append(torch.as_tensor(out, device=device))
    return Reading(*found)


def _largest(label: Ints, widths: Ints) -> int:
    """The block with the largest core; −1 if there is none."""
    return int(np.bincount(label, weights=widths).argmax()) if len(label) else -1
