"""The directions in unconstrained coordinates along which a model can move.

A softmax of K numbers has K − 1 of them, a coordinate on its boundary none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em.tracing.parameters import TracedParameter


def basis_of(
    parameters: Sequence[TracedParameter],
    variables: Sequence[Tensor],
    values: Mapping[str, Tensor],
    jacobian: Tensor,
    notes: list[str],
) -> Tensor:
    """Orthonormal directions in u along which θ moves. # (all u, free directions)"""
    total = jacobian.shape[1]
    columns: list[Tensor] = []
    begin = 0
    for p, v in zip(parameters, variables, strict=True):
        size = v.numel()
        boundary = _on_boundary(p, values[p.name].detach()).reshape(-1)
        if bool(boundary.any()):
            notes.append(
                f"parameter '{p.name}' has {int(boundary.sum())} value(s) on the boundary of its "
                "constraint; they are held there and have no standard error."
            )
        if _is_simplex(p.constraint):
            k = v.shape[-1]
            for row in range(size // k):
                inner = [j for j in range(k) if not bool(boundary[row * k + j])]
                # Helmert contrasts: orthonormal and orthogonal to the softmax's null direction.
                for m in range(1, len(inner)):
                    c = jacobian.new_zeros(total)
                    for j in inner[:m]:
                        c[begin + row * k + j] = 1.0
                    c[begin + row * k + inner[m]] = -float(m)
                    columns.append(c / c.norm())
        else:
            for j in range(size):
                moves = bool(jacobian[:, begin + j].abs().max() > 0)
                if moves and not (boundary.numel() == size and bool(boundary[j])):
                    c = jacobian.new_zeros(total)
                    c[begin + j] = 1.0
                    columns.append(c)
        begin += size
    return torch.stack(columns, -1) if columns else jacobian.new_zeros(total, 0)


def _is_simplex(constraint: constraints.Constraint) -> bool:
    base = constraint
    while isinstance(base, constraints.independent):
        base = base.base_constraint
    return base is constraints.simplex


def _on_boundary(p: TracedParameter, value: Tensor) -> Tensor:
    base = p.constraint
    while isinstance(base, constraints.independent):
        base = base.base_constraint
    near = 1e-7
    if base is constraints.simplex:
        return value < near
    out = torch.zeros_like(value, dtype=torch.bool)
    both = hasattr(base, "lower_bound") and hasattr(base, "upper_bound")
    for name, sign in (("lower_bound", 1), ("upper_bound", -1)):
        bound = getattr(base, name, None)
        if bound is not None and both:
            out |= sign * (value - bound) < near * (1 + abs(float(bound)))
        elif bound is not None:
            out |= value == bound
    return out
