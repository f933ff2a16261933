"""Tensors that say the same many times: what is expanded, held once."""

from __future__ import annotations

from torch import Tensor
from torch.autograd.graph import get_gradient_edge


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


def before_expansion(t: Tensor) -> Tensor:
    """What a tensor was expanded from, with its dimensions, by the shortest way to what it reads.

    A derivative through a view of an expanded tensor is as large as the expansion. Where nothing but
    expansions lies between the tensor and the one that holds its numbers, it is taken from that one.

    Args:
        t: A tensor.

    Example:
        >>> import torch
        >>> x = torch.zeros(3, requires_grad=True)
        >>> before_expansion(x.expand(5, 3)).shape
        torch.Size([1, 3])
    """
    below, base = t.grad_fn, t._base
    if below is None or base is None:
        return once_each(t)
    while below is not None and below.name() == "ExpandBackward0":
        below = below.next_functions[0][0]
    if below is not get_gradient_edge(base).node:
        return once_each(t)
    return base[(None,) * (t.dim() - base.dim())]
