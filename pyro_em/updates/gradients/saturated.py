"""Leaving the bounds of a constraint, where unconstrained coordinates see no slope.

Near a bound the map from unconstrained numbers u to a parameter θ saturates: ∂θ/∂u vanishes, and with
it every gradient in u, however steep the objective is in θ. A line search that overshoots ends there
for good. The condition at a maximum is one of θ: at a bound no step inwards gains (Karush, Kuhn and
Tucker). Where it fails, or where a climb has only just reached a bound, values further inside are
tried, at distances that grow geometrically.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import constraints, transform_to

from pyro_em.tracing.parameters import TracedParameter

Loss = Callable[[Mapping[str, Tensor]], Tensor]

_NEAR = 1e-3  # as a share of the width of an interval

_ALONE = 16  # coordinates that are searched one after the other; more are moved together

_GAIN = 1e-9  # nats per unit of expected count that a step inwards must promise

_WIDTHS = (0.5, 0.25, 0.75, 0.1, 0.9, 0.03, 0.97, 1e-2, 1e-3, 1e-4, 1e-6)

_DECADES = tuple(10.0**k for k in (0, 1, -1, 2, -2, 3, -3, 4, -4, 6, -6))


@dataclass(frozen=True, eq=False)
class _Edge:
    """Elements of a parameter that are near a bound, and how they go inside.

    Attributes:
        near: Which elements. # as the unconstrained value
        inward: Sign of the way inside, in θ.
        room: The longest way inside.
        distances: Fractions of ``room`` to try.
        move: From a fraction and a mask to the unconstrained value with these elements inside.
    """

    near: Tensor
    inward: Tensor
    room: Tensor
    distances: tuple[float, ...]
    move: Callable[[float, Tensor], Tensor]


def leave_bounds(
    parameters: Sequence[TracedParameter],
    variables: Sequence[Tensor],
    before: Sequence[Tensor],
    loss: Loss,
    value: Callable[[], float],
) -> bool:
    """Move coordinates inside where that lowers the loss; in place.

    Args:
        parameters: The parameters.
        variables: Their unconstrained values.
        before: The unconstrained values at which the climb began.
        loss: From constrained values to the loss.
        value: The loss at ``variables``, infinite where the model cannot run.

    Returns:
        Whether anything was moved, so that another climb is worth while.
    """
    edges = [_edge(p, v) for p, v in zip(parameters, variables, strict=True)]
    if not any(e is not None and bool(e.near.any()) for e in edges):
        return False
    slopes = _slopes(parameters, variables, loss)
    moved = False
    for p, v, b, edge, slope in zip(parameters, variables, before, edges, slopes, strict=True):
        if edge is None or slope is None or slope.shape != v.shape:
            continue
        promised = -slope * edge.inward * edge.room > _GAIN
        known = _edge(p, b)
        arrived = torch.ones_like(edge.near) if known is None else ~known.near
        chosen = edge.near & (promised | arrived)
        for mask in _one_by_one(chosen):
            moved |= _search(v, edge, mask, value)
    return moved


def _search(v: Tensor, edge: _Edge, mask: Tensor, value: Callable[[], float]) -> bool:
    """The best of the places inside, if it is better than where the coordinates are."""
    best, best_value = value(), None
    best -= 64 * torch.finfo(v.dtype).eps * max(1.0, abs(best)) if math.isfinite(best) else 0.0
    start = v.detach().clone()
    with torch.no_grad():
        for distance in edge.distances:
            v.copy_(torch.where(mask, edge.move(distance, mask), start))
            if not bool(torch.isfinite(v[mask]).all()):
                continue
            there = value()
            if there < best:
                best, best_value = there, v.detach().clone()
        v.copy_(start if best_value is None else best_value)
    return best_value is not None


def _one_by_one(chosen: Tensor) -> Iterator[Tensor]:
    places = chosen.reshape(-1).nonzero().reshape(-1)
    if len(places) > _ALONE:
        yield chosen
        return
    for place in places:
        mask = torch.zeros_like(chosen)
        mask.view(-1)[place] = True
        yield mask


def _slopes(
    parameters: Sequence[TracedParameter], variables: Sequence[Tensor], loss: Loss
) -> list[Tensor | None]:
    """Gradients in θ; on the simplex along the way to each corner."""
    with torch.enable_grad():
        values = [
            (v if p.leaf is p.unconstrained else transform_to(p.constraint)(v.detach()).detach())
            for p, v in zip(parameters, variables, strict=True)
        ]
        leaves = [v if v.requires_grad else v.requires_grad_() for v in values]
        named = {p.name: v for p, v in zip(parameters, leaves, strict=True)}
        gradients = torch.autograd.grad(loss(named), leaves, allow_unused=True)
    out: list[Tensor | None] = []
    for p, theta, g in zip(parameters, leaves, gradients, strict=True):
        if g is not None and _base(p.constraint) is constraints.simplex:
            g = g - (g * theta.detach()).sum(-1, keepdim=True)
        out.append(g)
    return out


def _edge(parameter: TracedParameter, v: Tensor) -> _Edge | None:
    """The elements near a bound; None where the constraint has no bounds of single elements."""
    base = _base(parameter.constraint)
    if parameter.leaf is parameter.unconstrained:
        return None
    u = v.detach()
    if base is constraints.simplex:
        return _edge_of_simplex(u)
    lower, upper = getattr(base, "lower_bound", None), getattr(base, "upper_bound", None)
    if (lower is None and upper is None) or base.event_dim:
        return None
    transform = transform_to(base)
    theta = transform(u)
    if theta.shape != u.shape:
        return None
    low = torch.as_tensor(-math.inf if lower is None else lower).to(theta).expand_as(theta)
    high = torch.as_tensor(math.inf if upper is None else upper).to(theta).expand_as(theta)
    width = high - low
    bounded = torch.isfinite(width)
    unit = torch.where(bounded, width, 1.0)
    near_low = (theta - low) < _NEAR * unit
    near_high = (high - theta) < _NEAR * unit
    inward = torch.where(near_low, 1.0, -1.0).to(theta)
    start = torch.where(near_low, low, high)
    # A coordinate at infinity is a structural zero: it stays.
    near = (near_low | near_high) & torch.isfinite(u)
    distances = _WIDTHS if bool(bounded.all()) else _DECADES

    def move(distance: float, mask: Tensor) -> Tensor:
        inside = torch.where(mask, start + inward * distance * unit, theta)
        return torch.where(mask, transform.inv(inside), u)

    return _Edge(near, inward, unit, distances, move)


def _edge_of_simplex(u: Tensor) -> _Edge:
    """Elements of a softmax close to zero; inwards is towards their corner."""
    p = torch.softmax(u, -1)

    def move(distance: float, mask: Tensor) -> Tensor:
        others = torch.where(mask, -math.inf, u).logsumexp(-1, keepdim=True)
        share = distance / mask.sum(-1, keepdim=True).clamp(min=1)
        return torch.where(mask, others + torch.log(share) - math.log1p(-distance), u)

    near = (p < _NEAR) & torch.isfinite(u)
    return _Edge(near, torch.ones_like(u), torch.ones_like(u), _WIDTHS, move)


def _base(constraint: constraints.Constraint) -> constraints.Constraint:
    base = constraint
    while isinstance(base, constraints.independent):
        base = base.base_constraint
    return base
