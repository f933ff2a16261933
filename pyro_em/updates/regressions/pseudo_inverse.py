"""Normal equations solved by the pseudo-inverse: what data do not determine stays where it is."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_DOUBTFUL = 1e-10  # of the largest eigenvalue: below, one may be zero and the rounding of long sums


def pseudo_solve(
    gram: Tensor,
    moment: Tensor,
    *,
    still: bool = False,
    is_idle: Callable[[Tensor], bool] | None = None,
) -> Tensor:
    """Pseudo-inverse solution with columns scaled to unit length.

    Columns that share no equation with others are solved apart: those of each row of loadings.

    Args:
        gram: # (columns, columns)
        moment: # (columns,)
        still: Whether the solution has no part along any direction that is not determined, whatever the
            units of the columns; else the scaled solution has none.
        is_idle: Whether a direction changes nothing, as far as rounding tells. It is asked where an
            eigenvalue is so small that it may be what rounding has left of zero.
    """
    out = torch.zeros_like(moment)
    for columns in _apart(gram):
        blocks = gram[columns.unsqueeze(-1), columns.unsqueeze(-2)]

        def own_is_idle(which: int, direction: Tensor, columns: Tensor = columns) -> bool:
            whole = torch.zeros_like(moment)
            whole[columns[which]] = direction
            return is_idle is not None and is_idle(whole)

        known = own_is_idle if is_idle is not None else None
        own = solve_each(blocks, moment[columns], still=still, is_idle=known)
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


def solve_each(
    gram: Tensor,
    moment: Tensor,
    *,
    still: bool = False,
    is_idle: Callable[[int, Tensor], bool] | None = None,
) -> Tensor:
    """`pseudo_solve` for each of some systems.

    Args:
        gram: # (systems, columns, columns)
        moment: # (systems, columns)
        still: See `pseudo_solve`.
        is_idle: See `pseudo_solve`; of a system and a direction.

    Returns:
        # (systems, columns)
    """
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(diagonal > 0, diagonal.clamp(min=torch.finfo(gram.dtype).tiny), 1.0).rsqrt()
    scaled = gram * scale.unsqueeze(-2) * scale.unsqueeze(-1)
    eigenvalues, vectors = torch.linalg.eigh(scaled)
    limit = eigenvalues[..., -1:] * gram.shape[-1] * torch.finfo(gram.dtype).eps
    is_told = eigenvalues > limit
    if is_idle is not None:
        is_small = is_told & (eigenvalues <= _DOUBTFUL * eigenvalues[..., -1:])
        for which, k in is_small.nonzero().tolist():
            is_told[which, k] = not is_idle(which, scale[which] * vectors[which, :, k])
    inverse = torch.where(is_told, 1 / eigenvalues.clamp(min=limit), 0.0)
    inner = vectors.mT @ (scale * moment).unsqueeze(-1)
    out = scale * (vectors @ (inverse.unsqueeze(-1) * inner)).squeeze(-1)
    if not still:
        return out
    count = (~is_told).sum(-1)
    for n in set(count.tolist()):
        if n:
            own = count == n
            free = vectors[own].mT[~is_told[own]].reshape(-1, n, gram.shape[-1]).mT
            Q = torch.linalg.qr(scale[own].unsqueeze(-1) * free).Q
            out[own] -= (Q @ (Q.mT @ out[own].unsqueeze(-1))).squeeze(-1)
    return out
