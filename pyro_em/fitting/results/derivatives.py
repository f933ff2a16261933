"""Derivatives of a log evidence in all its parameters, as matrices, and the scores of complete data.

See `pyro_em.fitting.results.standard_errors` for what they are of use for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em.tracing.parameters import TracedParameter

DRAWS = 8  # of random signs; a mean square of so many is right within a small factor


def hessian(total: Tensor, variables: Sequence[Tensor]) -> Tensor:
    """Second derivatives in all elements of the variables, one after the other. # (all u, all u)"""
    gradients = torch.autograd.grad(total, variables, create_graph=True, allow_unused=True)
    flat = torch.cat(
        [
            torch.zeros_like(v).reshape(-1) if g is None else g.reshape(-1)
            for v, g in zip(variables, gradients, strict=True)
        ]
    )
    return jacobian_of([flat], variables)


def without_slope(
    total: Tensor, parameters: Sequence[TracedParameter], values: Mapping[str, Tensor]
) -> Tensor:
    """The evidence less its linear part in θ, so that the map from u to θ adds no curvature.

    A fit stops where the slope is small, not where it is zero. Times the curvature of a softmax it
    would give a flat direction some information. Correlation matrices and the like are left as they
    are: no straight line stays among them.
    """
    straight = [p.name for p in parameters if _is_flat(p.constraint)]
    attached = [values[n] for n in straight if values[n].requires_grad]
    if not attached or not total.requires_grad:
        return total
    slopes = torch.autograd.grad(total, attached, retain_graph=True, allow_unused=True)
    for theta, slope in zip(attached, slopes, strict=True):
        if slope is not None:
            total = total - (torch.nan_to_num(slope.detach(), 0.0, 0.0, 0.0) * theta).sum()
    return total


def _is_flat(constraint: constraints.Constraint) -> bool:
    """Whether between two values of a constraint there is a straight line of values."""
    base = constraint
    while isinstance(base, constraints.independent):
        base = base.base_constraint
    shape = type(base).__name__.lstrip("_")
    cones = (
        "LowerCholesky",
        "SoftplusLowerCholesky",
        "PositiveDefinite",
        "SoftplusPositiveDefinite",
    )
    return base is constraints.simplex or base.event_dim == 0 or shape in cones


def random_scores(
    tables: Sequence[Tensor],
    total: Tensor,
    variables: Sequence[Tensor],
    n: int = DRAWS,
    seed: int = 0,
) -> Tensor:
    """Draws whose mean square is F: scores of all cells under random signs. # (n, all u)"""
    attached = [t for t in tables if t.requires_grad]
    if not attached or not total.requires_grad:
        return torch.zeros(n, sum(v.numel() for v in variables), dtype=total.dtype)
    counts = torch.autograd.grad(total, attached, retain_graph=True, allow_unused=True)
    generator = torch.Generator().manual_seed(seed)
    draws = []
    for _ in range(n):
        parts = []
        for table, count in zip(attached, counts, strict=True):
            if count is None:
                continue
            signs = torch.randint(0, 2, table.shape, generator=generator).to(table) * 2 - 1
            weight = count.detach().clamp(min=0).to(table).sqrt() * signs
            parts.append((weight * torch.where(weight == 0, 0.0, table)).sum())
        gradients = torch.autograd.grad(sum(parts), variables, retain_graph=True, allow_unused=True)  # type: ignore[arg-type]
        draws.append(
            torch.cat(
                [
                    torch.zeros_like(v).reshape(-1) if g is None else g.reshape(-1)
                    for v, g in zip(variables, gradients, strict=True)
                ]
            )
        )
    return torch.nan_to_num(torch.stack(draws).detach(), posinf=0.0, neginf=0.0)


def jacobian_of(outputs: Sequence[Tensor], variables: Sequence[Tensor]) -> Tensor:
    """Derivatives of all elements of the outputs in all of the variables. # (elements, all u)"""
    rows = []
    for out in outputs:
        for element in out.reshape(-1):
            if not element.requires_grad:
                rows.append(torch.cat([torch.zeros_like(v).reshape(-1) for v in variables]))
                continue
            parts = torch.autograd.grad(element, variables, retain_graph=True, allow_unused=True)
            rows.append(
                torch.cat(
                    [
                        torch.zeros_like(v).reshape(-1) if g is None else g.reshape(-1)
                        for v, g in zip(variables, parts, strict=True)
                    ]
                )
            )
    return torch.nan_to_num(torch.stack(rows).detach())
