"""The Cholesky factor of Λ = I + Σ bᵀ b from its rows b, without forming Λ.

Forming Λ squares its condition: where precise data leave a combination of unknowns to the prior, the 1
that decides is lost below their 10¹⁶. The QR decomposition of the rows above the identity has the same
factor, Λ = Rᵀ R, and loses only half as many digits. It is taken of pieces of each block, then of the
pieces' factors, and so on, so that blocks of very different numbers of rows make one batch.

Source: Demmel, Grigori, Hoemmen and Langou (2012), "Communication-optimal parallel and sequential QR
and LU factorizations", for the tree.
"""

from __future__ import annotations

import torch
from torch import Tensor


def square_root(rows: Tensor, block: Tensor, blocks: int, known: int | None = None) -> Tensor:
    """The lower factors of I + Σ bᵀ b over the rows of each block.

    Args:
        rows: b. # (cells, R, d)
        block: The block of each row. # (R,)
        blocks: How many there are.
        known: How many of the first columns the identity is of; by default all.

    Returns:
        Lower triangular, with a diagonal that is not negative. # (cells, blocks, d, d)

    Example:
        >>> square_root(torch.tensor([[[3.0], [4.0], [0.0]]]), torch.tensor([0, 0, 1]), 2).flatten()
        tensor([5.0990, 1.0000])
    """
    d = rows.shape[-1]
    order = block.argsort(stable=True)
    rows, block = rows[:, order], block[order]
    most = max(4 * d, 32)  # rows of a piece: at each level a quarter of them is left
    while True:
        count = torch.bincount(block, minlength=blocks)
        rank = torch.arange(len(block), device=block.device) - (count.cumsum(0) - count)[block]
        if int(count.max()) <= most:
            break
        pieces = -(-count // most)
        piece = (pieces.cumsum(0) - pieces)[block] + rank // most
        factors = _triangles(_padded(rows, piece, rank % most, int(pieces.sum()), most))
        rows = factors.flatten(1, 2)
        block = torch.arange(blocks, device=block.device).repeat_interleave(pieces * d)
    # The identity comes last: Householder reflections keep small rows best below large ones.
    longest = int(count.max()) if len(block) else 0
    stacked = _padded(rows, block, rank, blocks, longest)
    eye = torch.eye(d, dtype=rows.dtype, device=rows.device)
    if known is not None:
        eye[known:] = 0
    eye = eye.expand(*stacked.shape[:2], d, d)
    R = _triangles(torch.cat([stacked, eye], 2))
    signs = torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(R)
    return (R * signs.unsqueeze(-1)).mT


def _padded(rows: Tensor, batch: Tensor, rank: Tensor, batches: int, most: int) -> Tensor:
    """The rows of each batch below each other, then zeros. # (cells, batches, most, d)"""
    cells, _, d = rows.shape
    out = rows.new_zeros(cells, batches * most, d)
    out[:, batch * most + rank] = rows
    return out.reshape(cells, batches, most, d)


def _triangles(x: Tensor) -> Tensor:
    """R of the QR decomposition. # (..., d, d)"""
    return torch.linalg.qr(x, mode="r").R
