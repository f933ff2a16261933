"""Arguments that are a power of one latent's element times a factor, proven from the autograd graph.

An argument a(λ) = f λ^e, element by element, if every operation between them is a view, a product of
which one side alone depends on λ, or a power; or the exponential of a logarithm to which something may
have been added. What does not depend on λ may be anything.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.graph import Node

from pyro_em.graph.bindings.linearity import operation_of, parents_first
from pyro_em.graph.bindings.nodes import VIEWS

_POWERS = {"Sqrt": 0.5, "Rsqrt": -0.5, "Reciprocal": -1.0}
_CHOICES = ("Where", "MaskedFill")


@dataclass(frozen=True)
class _Power:
    """λ^exponent times a factor, or the logarithm of that."""

    exponent: float
    is_log: bool = False


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
    powers: dict[Node, _Power | None] = {}
    for node in parents_first(tensor.grad_fn):
        variable = getattr(node, "variable", None)
        if variable is not None:
            powers[node] = _Power(1.0) if variable is leaf else None
            continue
        sides = [None if n is None else powers[n] for n, _ in node.next_functions]
        found = _after(node, sides)
        if isinstance(found, str):
            return found
        powers[node] = found
    top = powers[tensor.grad_fn]
    if top is None:
        return "nothing of it is seen"
    return "it is a logarithm" if top.is_log else top.exponent


def _after(node: Node, sides: list[_Power | None]) -> _Power | str | None:
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
        times = _times_of_log(node, sides) if reached[0].is_log else _times(node, sides)
        if name == "Log" and not reached[0].is_log:
            return replace(reached[0], is_log=True)
        if name == "Exp" and reached[0].is_log:
            return replace(reached[0], is_log=False)
        if times:
            return replace(reached[0], exponent=reached[0].exponent * times)
    elif name in ("Mul", "Div"):
        return "it is multiplied with itself"
    return f"an operation that is no product reaches it ({name.lower()})"


def _times(node: Node, sides: list[_Power | None]) -> float:
    """By what an operation multiplies the exponent of a power; zero where it makes none of it."""
    name = operation_of(node)
    if name in ("Mul", "Div"):
        return -1.0 if sides[0] is None and name == "Div" else 1.0
    exponent = getattr(node, "_saved_exponent", math.nan) if name == "Pow" else math.nan
    is_known = isinstance(exponent, (int, float)) and math.isfinite(exponent)
    return float(exponent) if is_known else _POWERS.get(name, 0.0)


def _times_of_log(node: Node, sides: list[_Power | None]) -> float:
    """The same of the logarithm of a power."""
    name, is_first = operation_of(node), sides[0] is not None
    if name in ("Add", "Sub", "Rsub", "Neg"):
        alpha = float(getattr(node, "_saved_alpha", 1.0))
        if name in ("Rsub", "Neg"):
            return -alpha if is_first else 1.0
        if is_first:
            return 1.0
        return alpha if name == "Add" else -alpha
    if name == "Mul" or (name == "Div" and is_first):
        known = getattr(node, "_saved_other" if is_first else "_saved_self", None)
        # What parameters reach is another exponent elsewhere.
        if isinstance(known, torch.Tensor) and known.numel() and not known.requires_grad:
            times = float(known.reshape(-1)[0])
            if math.isfinite(times) and bool((known == times).all()):
                return 1 / times if name == "Div" and times else times
    return 0.0
