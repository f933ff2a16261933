"""Arguments that are a latent probability or one minus it, proven from the autograd graph.

Log odds may stand for either: torch.logit(p), p.log() - (1 - p).log(), -torch.logit(p).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.graph.bindings.linearity import operation_of, parents_first, why_not_linear
from pyro_em.graph.bindings.nodes import VIEWS
from pyro_em.graph.bindings.sparse_lines import forward_of, numbers_read

# Element by element, and analytic: two such functions that agree at random numbers agree.
_SMOOTH = frozenset(["Add", "Div", "Log", "Log1P", "Logit", "Mul", "Neg", "Rsub", "Sub"])
_CHOICES = frozenset(["MaskedFill", "Where"])


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
    return _share(tensor, leaf, is_odds=False)


def share_of_log_odds(tensor: Tensor, leaf: Tensor, latent: str) -> Share | str:
    """As `share_of`, of log odds.

    Example:
        >>> p = torch.tensor([0.2, 0.7], requires_grad=True)
        >>> share_of_log_odds((1 - p).log() - p.log(), p, "p").turned
        tensor([True, True])
    """
    assert tensor.grad_fn is not None
    reached = {}
    for node in parents_first(tensor.grad_fn):
        variable = getattr(node, "variable", None)
        if variable is not None:
            reached[node] = variable is leaf
            continue
        reached[node] = any(reached[n] for n, _ in node.next_functions if n is not None)
        name = operation_of(node)
        if not reached[node] or node.name() in VIEWS or name in _CHOICES:
            continue
        if name not in _SMOOTH or getattr(node, "_saved_eps", None) is not None:
            return f"an operation that makes no log odds reaches it ({name.lower()})"
    return _share(tensor, leaf, is_odds=True)


def _share(tensor: Tensor, leaf: Tensor, *, is_odds: bool) -> Share | str:
    """What each cell reads, where its value and its slope are those of p or of the log odds of p."""
    forward = forward_of(tensor, leaf)
    slope = forward(torch.ones_like(leaf)).detach()
    elements = numbers_read(forward, slope, leaf.shape, leaf.numel())
    p = leaf.detach().reshape(-1)[elements.clamp(min=0)].to(tensor)
    reads, turned = elements >= 0, slope < 0
    value = tensor.detach().sigmoid() if is_odds else tensor.detach()
    rise = slope.abs() * p * (1 - p) if is_odds else slope.abs()
    eps = 1e3 * torch.finfo(value.dtype).eps
    same = torch.isclose(value, torch.where(turned, 1 - p, p), rtol=0.0, atol=eps)
    same = same & torch.isclose(rise, torch.ones_like(rise), rtol=0.0, atol=eps)
    if not bool((same | ~reads).all()):
        return "it is neither an element of it nor one minus that"
    return Share(elements, turned & reads)
