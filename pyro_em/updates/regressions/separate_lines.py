"""Loadings that have an equation of their own: nothing of the size of their square is made.

Where every element of a block of parameters is one coefficient (C, b) of one entry of a mean, and rows
differ in nothing, the normal equations of `gaussian_lines` are one small system for each entry d,

    (Σ w E[φ φᵀ]) δ_d = Σ w E[r_d φ],

with the coordinates of φ whose coefficients are free. The noise of the entry cancels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pyro_em.graph.bindings.binding import Binding
from pyro_em.graph.factors import Group
from pyro_em.updates.expectations.beliefs import Moments
from pyro_em.updates.expectations.gaussian_rows import coefficient_rows, is_matrix, rows_of
from pyro_em.updates.expectations.linear_moments import summed
from pyro_em.updates.regressions.pseudo_inverse import solve_each


def separate_step(
    group: Group,
    block: Sequence[str],
    arguments: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
) -> Tensor | None:
    """By how much to move the parameters of a block; None where they share equations.

    Args:
        group: The only site whose mean they reach.
        block: Parameter names.
        arguments: The current arguments.
        values: The current parameters, for their sizes.

    Returns:
        # (elements of all parameters,)
    """
    belief = group.belief
    if not isinstance(belief, Moments) or is_matrix(group) or belief.weights.dim() != 2:
        return None
    columns = _columns(group, block, values)
    cells = len(belief.moments.phi_phi)
    if columns is None or columns.shape[:2] != (cells, 1):
        return None
    if rows_of(group, arguments["scale"]).shape[1] > 1:
        return None
    used = columns[columns >= 0]
    total = sum(values[p].numel() for p in block)
    if int(torch.bincount(used, minlength=total).max()) > 1:
        return None
    m = belief.moments
    delta = coefficient_rows(group, arguments) - belief.coefficients
    r_phi = m.r_phi - delta @ m.phi_phi  # E[r φᵀ] at the current coefficients
    sums = summed(type(m)(m.phi_phi, r_phi, m.r_r, m.diagonal), belief.weights)
    out = r_phi.new_zeros(total)
    for own, phi_phi, right in zip(columns[:, 0], sums.phi_phi, sums.r_phi, strict=True):
        free = own >= 0
        both = (free.unsqueeze(-1) & free.unsqueeze(-2)).to(phi_phi.dtype)
        step = solve_each(phi_phi * both, right * free)
        out[own[free]] = step[free]
    return out


def _columns(group: Group, block: Sequence[str], values: Mapping[str, Tensor]) -> Tensor | None:
    """Which element of the block each coefficient is, −1 for none. # (cells or 1, rows or 1, D, Q + 1)

    None where one is more than an element as it stands.
    """
    begins, begin = {}, 0
    for name in block:
        begins[name] = begin
        begin += values[name].numel()
    parts = []
    for a in (*(a for a in group.lines if a != "loc"), "loc"):
        number = _numbers(group.bindings[a], begins)
        if number is None:
            return None
        parts.append(rows_of(group, number, 1) if a != "loc" else rows_of(group, number)[..., None])
    shape = torch.broadcast_shapes(*(p.shape[:2] for p in parts))
    return torch.cat([p.expand(*shape, *p.shape[2:]) for p in parts], -1)


def _numbers(binding: Binding, begins: Mapping[str, int]) -> Tensor | None:
    out = torch.full_like(binding.constant, -1, dtype=torch.long)
    if not set(binding.params).intersection(begins):
        return out
    if binding.how != "selection":
        return None
    for part in binding.selections:
        if part.maps or part.factor is not None:
            return None
        if part.param in begins:
            out = torch.where(part.index >= 0, part.index + begins[part.param], out)
    return out
