"""An objective that is a sum over parts of the data, differentiable as if the parts were at hand.

    Q(θ) = Σ_parts Q_part(θ),    ∇Q and ∇²Q likewise

Parts are visited for numbers, not for graphs, so that no part outlives its turn: the value with its
slope in one pass, second derivatives in another where somebody asks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_em.updates.sums.data_sums import Derivatives

# From all moved values, one after the other, and an order (0, 1 or 2) to the derivatives up to it.
Ask = Callable[[Tensor, int], Derivatives]


def parted(ask: Ask, moved: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    """Q at some values, with a graph to them. # ()

    Args:
        ask: Goes through the parts.
        moved: Constrained values.
        names: The order in which ``ask`` takes them.

    Example:
        >>> def ask(x, order):
        ...     return Derivatives((x**3).sum(), 3 * x**2, torch.diag(6 * x))
        >>> x = torch.tensor([2.0], requires_grad=True)
        >>> (slope,) = torch.autograd.grad(parted(ask, {"x": x}, ["x"]), x, create_graph=True)
        >>> slope.item(), torch.autograd.grad(slope, x)[0].item()
        (12.0, 12.0)
    """
    flat = torch.cat([moved[name].reshape(-1) for name in names])
    out: Tensor = _Value.apply(flat, ask)
    return out


class _Value(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flat: Tensor, ask: Ask) -> Tensor:
        found = ask(flat.detach(), 1 if ctx.needs_input_grad[0] else 0)
        ctx.ask, ctx.slope = ask, found.gradient.to(flat)
        ctx.save_for_backward(flat)
        return found.value.clone()

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None]:
        (flat,) = ctx.saved_tensors
        return outer.to(flat) * _Slope.apply(flat, ctx.slope, ctx.ask), None


class _Slope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flat: Tensor, slope: Tensor, ask: Ask) -> Tensor:
        ctx.ask, ctx.hessian = ask, None
        ctx.save_for_backward(flat)
        return slope.clone()

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None]:
        (flat,) = ctx.saved_tensors
        if ctx.hessian is None:  # asked for once for each of its rows
            ctx.hessian = ctx.ask(flat.detach(), 2).hessian.to(flat)
        return outer @ ctx.hessian, None, None
