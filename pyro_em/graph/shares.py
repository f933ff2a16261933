"""Arguments that are a latent probability or one minus it, proven from the autograd graph."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.graph.linearity import why_not_linear
from pyro_em.graph.sparse_lines import forward_of, numbers_read


@dataclass(frozen=True, eq=False)
class Share:
    """What each cell of an argument reads of a latent probability.

    Attributes:
        elements: The flat number of the element, −1 where the cell is constant. # the argument's shape
        turned: Where it is one minus the element.
    """

    elements: Tensor
    turned: Tensor


def share_of(tensor: Tensor, leaf: Tensor, latent: str) -> Share | str:
    """Which element, or one minus it, each cell is; in words why one is neither.

    Args:
        tensor: As a run computed it.
        leaf: The value of the latent in that run, of random numbers.
        latent: Its name.

    Example:
        >>> p = torch.tensor([0.2, 0.7], requires_grad=True)
        >>> share_of(1 - p[[1, 1, 0]], p, "p").elements
        tensor([1, 1, 0])
        >>> share_of(p / 2, p, "p")
        'it is neither an element of it nor one minus that'
    """
    why = why_not_linear(tensor, {latent: leaf})
    if why:
        return why
    forward = forward_of(tensor, leaf)
    slope = forward(torch.ones_like(leaf)).detach()
    elements = numbers_read(forward, slope, leaf.shape, leaf.numel())
    p, value = leaf.detach().reshape(-1)[elements.clamp(min=0)].to(tensor), tensor.detach()
    reads, turned = elements >= 0, slope < 0
    eps = 1e3 * torch.finfo(value.dtype).eps
    same = torch.isclose(value, torch.where(turned, 1 - p, p), rtol=0.0, atol=eps)
    same = same & torch.isclose(slope.abs(), torch.ones_like(slope), rtol=0.0, atol=eps)
    if not bool((same | ~reads).all()):
        return "it is neither an element of it nor one minus that"
    return Share(elements, turned & reads)
