"""Elementwise functions of large tensors, piece by piece.

Torch makes several numbers of each element on the way to one bit (``isfinite`` takes absolute values
first), and blocks of several MB, once freed, stay with the C library as holes in the heap. Pieces of
half a MB fit into the holes of those before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

PIECE = 2**16  # elements


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of tensors of one shape, cut alike along the dimension with the most elements.

    Example:
        >>> sum(len(x) for (x,) in pieces(torch.zeros(100_000)))
        100000
    """
    shape, numel = tensors[0].shape, tensors[0].numel()
    if numel <= PIECE:
        yield tensors
        return
    longest = max(range(len(shape)), key=lambda d: shape[d])
    step = max(1, PIECE * shape[longest] // numel)
    yield from zip(*(t.split(step, longest) for t in tensors), strict=True)


def where_true(condition: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
    """Where a condition holds. # like the value, bool

    Args:
        condition: From some elements to one bit for each.
        value: All of them.

    Example:
        >>> where_true(torch.isinf, torch.tensor([0.0, torch.inf])).tolist()
        [False, True]
    """
    if value.numel() <= PIECE:
        return condition(value)
    out = torch.empty(value.shape, dtype=torch.bool, device=value.device)
    for part, own in pieces(value, out):
        own.copy_(condition(part))
    return out
