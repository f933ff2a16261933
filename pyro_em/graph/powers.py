"""Arguments that are a power of one latent's element times a factor, proven from the autograd graph.

An argument a(λ) = f λ^e, element by element, if every operation between them is a view, a product of
which one side alone depends on λ, or a power. What does not depend on λ may be anything.
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.autograd.graph import Node

from pyro_em.graph.linearity import operation_of, parents_first
from pyro_em.graph.nodes import VIEWS

_POWERS = {"Sqrt": 0.5, "Rsqrt": -0.5, "Reciprocal": -1.0}
_CHOICES = ("Where", "MaskedFill")


def power_of(tensor: Tensor, leaf: Tensor) -> float | str:
    """The power e in f λ^e, or in words why a tensor is none.

    Args:
        tensor: As a run computed it.
        leaf: The value of the latent in that run.

    Example:
        >>> import torch
        >>> w = torch.ones(3, requires_grad=True)
        >>> power_of(2.0 / w[[0, 0, 2]].sqrt(), w), power_of(1 + w, w)
        (-0.5, 'an operation that is no product reaches it (add)')
    """
    if tensor is leaf:
        return 1.0
    if tensor.grad_fn is None:
        return "nothing of it is seen"
    powers: dict[Node, float | None] = {}
    for node in parents_first(tensor.grad_fn):
        variable = getattr(node, "variable", None)
        if variable is not None:
            powers[node] = 1.0 if variable is leaf else None
            continue
        sides = [None if n is None else powers[n] for n, _ in node.next_functions]
        found = _after(node, sides)
        if isinstance(found, str):
            return found
        powers[node] = found
    top = powers[tensor.grad_fn]
    return "nothing of it is seen" if top is None else top


def _after(node: Node, sides: list[float | None]) -> float | str | None:
    """The power behind one operation, from those of what it reads."""
    reached = [s for s in sides if s is not None]
    if not reached:
        return None
    name = operation_of(node)
    if node.name() in VIEWS or name in _CHOICES:
        if len(set(reached)) > 1:
            return "different powers of it are put together"
        return reached[0]
    if len(reached) == 1:
        power = reached[0]
        if name == "Mul":
            return power
        if name == "Div":
            return power if sides[0] is not None else -power
        if name in _POWERS:
            return power * _POWERS[name]
        exponent = getattr(node, "_saved_exponent", math.nan) if name == "Pow" else math.nan
        if isinstance(exponent, (int, float)) and math.isfinite(exponent) and exponent:
            return power * float(exponent)
    elif name in ("Mul", "Div"):
        return "it is multiplied with itself"
    return f"an operation that is no product reaches it ({name.lower()})"
