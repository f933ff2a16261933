"""Which rows of a matrix are equal: by counting where they hold whole numbers, by sorting otherwise."""

from __future__ import annotations

import torch
from torch import Tensor

_EXACT = 2.0**53  # whole numbers below it are exact in float64


def equal_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct rows in lexicographic order: which one each row is, and how often each occurs.

    Args:
        rows: In float64. # (N, D)

    Returns:
        Numbers of distinct rows, and their counts. # (N,), (distinct,)

    Example:
        >>> rows = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 0.0]], dtype=torch.float64)
        >>> equal_rows(rows)
        (tensor([1, 0, 1]), tensor([1, 2]))
    """
    code = _coded(rows)
    if code is not None:
        return code
    _, inverse, counts = rows.unique(dim=0, return_inverse=True, return_counts=True)
    return inverse, counts


def _coded(rows: Tensor) -> tuple[Tensor, Tensor] | None:
    """The same by one number per row, which is many times quicker; None where rows have none."""
    if not len(rows) or not rows.shape[1] or not _are_whole(rows):
        return None
    low = rows.amin(0)
    widths = (rows.amax(0) - low + 1).tolist()
    if not sum(widths) < _EXACT:
        return None
    code, size = torch.zeros(len(rows), dtype=torch.int64, device=rows.device), 1
    for d, width in enumerate(int(w) for w in widths):
        if size * width >= _EXACT:
            code, counts = numbered(code, size)
            size = len(counts)
            if size * width >= _EXACT:
                return None
        code = code * width + (rows[:, d] - low[d]).long()
        size *= width
    return numbered(code, size)


def _are_whole(rows: Tensor) -> bool:
    """Whether all numbers are whole."""
    return not any(bool((part != part.round()).any()) for part in rows.split(2**16))


def numbered(code: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Codes below ``size`` as numbers without gaps, in the same order, and how often each occurs."""
    if size > 4 * len(code):
        _, inverse, counts = code.unique(return_inverse=True, return_counts=True)
        return inverse, counts
    counts = torch.bincount(code, minlength=size)
    present = counts > 0
    return (present.cumsum(0) - 1)[code], counts[present]
