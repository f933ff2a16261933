"""Products of pairs of features, x_i x_j with i ≤ j, in few operations.

They stand in the order of how far apart i and j are, around a circle of D features: all x_i², then all
x_i x_{i+1} with x_D x_1 the last of them, and so on up to half way round. With x twice in a row of
memory, each of these blocks is the product of x and the D rows from the d-th on: one operation for all.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

_FEW = 2**12  # products up to which one of all copies is quicker than one of each block


def upper_pairs(D: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The pairs i ≤ j, in the order of `products`. # (P,) each

    Example:
        >>> i, j = upper_pairs(4, torch.device("cpu"))
        >>> [f"{a}{b}" for a, b in zip(i.tolist(), j.tolist())]
        ['00', '11', '22', '33', '01', '12', '23', '03', '02', '13']
    """
    i = torch.arange(D * (D + 1) // 2, device=device)
    j = i + i.div(D, rounding_mode="floor")
    i, j = i % D, j % D
    return torch.minimum(i, j), torch.maximum(i, j)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _known_pairs(D: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return upper_pairs(D, device)


def unfolding(D: int, device: torch.device) -> Tensor:
    """For each element of a symmetric matrix its place among the `upper_pairs`. # (D * D,)"""
    i, j = upper_pairs(D, device)
    out = torch.zeros(D, D, dtype=torch.long, device=device)
    out[i, j] = out[j, i] = torch.arange(len(i), device=device)
    return out.reshape(-1)


def with_products(x: Tensor) -> Tensor:
    """x, and x_i x_j of the `upper_pairs`. # (D, rows) to (D + P, rows)"""
    D, rows = x.shape
    if D * (D + 1) // 2 * rows <= _FEW:
        i, j = _known_pairs(D, x.device)
        return torch.cat([x, x.index_select(0, i) * x.index_select(0, j)])
    out = x.new_empty(2 * D + D * (D + 1) // 2, rows)
    out[: 2 * D].view(2, D, rows).copy_(x)
    blocks = (D + 1) // 2
    end = (2 + blocks) * D
    further = out.as_strided((blocks, D, rows), (rows, rows, 1))  # block d begins at row d
    torch.mul(out[:D], further, out=out[2 * D : end].view(blocks, D, rows))
    if D % 2 == 0:  # half way round each pair is met once
        torch.mul(out[: D // 2], out[D // 2 : D], out=out[end:])
    return out[D:]


def products(x: Tensor) -> Tensor:
    """x_i x_j of the `upper_pairs`. # (D, rows) to (P, rows)"""
    return with_products(x)[len(x) :]
