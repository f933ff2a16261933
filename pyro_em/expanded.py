"""Tensors that say the same many times: what is expanded, held once."""

from __future__ import annotations

from torch import Tensor


def once_each(t: Tensor, lead: int | None = None) -> Tensor:
    """A view whose expanded dimensions are of size one.

    Args:
        t: A tensor.
        lead: How many dimensions are looked at, from the left; all by default.

    Example:
        >>> import torch
        >>> once_each(torch.zeros(3, 1).expand(3, 5)).shape
        torch.Size([3, 1])
    """
    for d in range(t.dim() if lead is None else lead):
        if t.shape[d] > 1 and t.stride(d) == 0:
            t = t.narrow(d, 0, 1)
    return t
