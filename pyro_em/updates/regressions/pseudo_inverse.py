"""Normal equations solved by the pseudo-inverse: what data do not determine stays where it is."""

from __future__ import annotations

import torch
from torch import Tensor


def pseudo_solve(gram: Tensor, moment: Tensor, *, still: bool = False) -> Tensor:
    """Pseudo-inverse solution with columns scaled to unit length.

    Columns that share no equation with others are solved apart: those of each row of loadings.

    Args:
        gram: # (columns, columns)
        moment: # (columns,)
        still: Whether the solution has no part along any direction that is not determined, whatever the
            units of the columns; else the scaled solution has none.
    """
    out = torch.zeros_like(moment)
    for columns in _apart(gram):
        blocks = gram[columns.unsqueeze(-1), columns.unsqueeze(-2)]
        own = solve_each(blocks, moment[columns], still=still)
        out[columns.reshape(-1)] = own.reshape(-1)
    return out


def _apart(gram: Tensor) -> list[Tensor]:
    """The columns of a Gram matrix that share equations, those of equal number together.

    Returns:
        # (blocks, columns) each
    """
    n = len(gram)
    place = torch.arange(n, device=gram.device)
    coupled = gram != 0
    label, before = place, place - 1
    while not torch.equal(label, before):
        before = label
        label = torch.minimum(label, torch.where(coupled, label, n).amin(-1))
    order = torch.argsort(label, stable=True)
    sizes = torch.unique_consecutive(label[order], return_counts=True)[1].tolist()
    by_size: dict[int, list[Tensor]] = {}
    for columns in order.split(sizes):
        by_size.setdefault(len(columns), []).append(columns)
    return [torch.stack(columns) for columns in by_size.values()]


def solve_each(gram: Tensor, moment: Tensor, *, still: bool = False) -> Tensor:
    """`pseudo_solve` for each of some systems.

    Args:
        gram: # (systems, columns, columns)
        moment: # (systems, columns)
        still: See `pseudo_solve`.

    Returns:
        # (systems, columns)
    """
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(diagonal > 0, diagonal.clamp(min=torch.finfo(gram.dtype).tiny), 1.0).rsqrt()
    scaled = gram * scale.unsqueeze(-2) * scale.unsqueeze(-1)
    eigenvalues, vectors = torch.linalg.eigh(scaled)
    limit = eigenvalues[..., -1:] * gram.shape[-1] * torch.finfo(gram.dtype).eps
    inverse = torch.where(eigenvalues > limit, 1 / eigenvalues.clamp(min=limit), 0.0)
    inner = vectors.mT @ (scale * moment).unsqueeze(-1)
    out = scale * (vectors @ (inverse.unsqueeze(-1) * inner)).squeeze(-1)
    if not still:
        return out
    undetermined = (inverse == 0).sum(-1)  # eigenvalues ascend: these are the first
    for n in set(undetermined.tolist()):
        if n:
            own = undetermined == n
            free = torch.linalg.qr(scale[own].unsqueeze(-1) * vectors[own][..., :n]).Q
            out[own] -= (free @ (free.mT @ out[own].unsqueeze(-1))).squeeze(-1)
    return out
