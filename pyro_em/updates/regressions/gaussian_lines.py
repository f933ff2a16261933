"""Normal equations of all that the mean of a site is made of, loadings and offsets together.

With φ = (u, 1), r = y − (C, b) φ and J = ∂(C, b)/∂θ, the maximiser of the expected log density given
the spreads moves θ by δ with

    (Σ w E[(Jφ)ᵀ P (Jφ)]) δ = Σ w E[(Jφ)ᵀ P r].

Where J is the same for all rows, which loadings are, only sums over rows enter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pyro_em.graph.factors import Group
from pyro_em.updates.expectations.beliefs import Moments
from pyro_em.updates.expectations.gaussian_rows import design_of, is_matrix, rows_of
from pyro_em.updates.expectations.linear_moments import summed
from pyro_em.updates.expectations.noiseless import precision_of
from pyro_em.updates.regressions.expansion import Expansion

_MANY = 2**24  # numbers of a design that are held at once


def normal_equations(
    number: int,
    group: Group,
    block: Sequence[str],
    arguments: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
    expansions: Sequence[Expansion] = (),
) -> tuple[Tensor, Tensor]:
    """What one site adds to the normal equations of a block of parameters.

    Args:
        number: The number of the site's group.
        group: A site that reads Gaussian latents, with its moments.
        block: Parameter names.
        arguments: The current arguments.
        values: The current parameters, for their sizes.
        expansions: Latents whose working coefficients are among the unknowns, after the parameters.

    Returns:
        Gram matrix and right-hand side. # (p, p), (p,)
    """
    belief, group = group.belief, group.linear_in(block, values)
    assert isinstance(belief, Moments)
    design = _designs(number, group, block, arguments, values, expansions)
    delta = belief.change(group, arguments)
    m = belief.moments
    r_phi = m.r_phi - delta @ m.phi_phi  # E[r φᵀ] at the current coefficients
    moved = type(m)(m.phi_phi, r_phi, m.r_r, m.diagonal)
    precision = _precisions(group, arguments)
    is_shared = design.shape[1] == precision.shape[1] == 1 and belief.weights.dim() == 2
    sums = summed(moved, belief.weights) if is_shared else None
    gram, right = design.new_zeros(design.shape[-1], design.shape[-1]), design.new_zeros(())
    for cell in range(len(m.phi_phi)):
        own = (_of_cell(design, cell), _of_cell(precision, cell))
        if sums is None:
            weights = _of_cell(belief.weights, cell)
            parts = _by_rows(*own, m.phi_phi[cell], r_phi[cell], weights)
        else:
            weighed = _weighed(own[1], sums.r_phi[cell])[0]
            parts = _shared(own[0][0], own[1][0], sums.phi_phi[cell], weighed)
        gram, right = gram + parts[0], right + parts[1]
    return gram, right


def _of_cell(t: Tensor, cell: int) -> Tensor:
    return t[cell] if len(t) > 1 else t[0]


def _precisions(group: Group, arguments: Mapping[str, Tensor]) -> Tensor:
    """P, or its diagonal. # (cells or 1, rows or 1, D, D) or (cells or 1, rows or 1, D)"""
    if is_matrix(group):
        return precision_of(group, arguments)
    return rows_of(group, arguments["scale"]).to(torch.float64) ** -2


def _weighed(precision: Tensor, x: Tensor) -> Tensor:
    """P x for x of D rows. # (·, D, ·)"""
    return precision.unsqueeze(-1) * x if precision.dim() == 2 else precision @ x


def _designs(
    number: int,
    group: Group,
    block: Sequence[str],
    arguments: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
    expansions: Sequence[Expansion],
) -> Tensor:
    """J, offset last. # (cells or 1, rows or 1, D, Q + 1, p)"""
    columns = []
    for name in block:
        parts = [
            design_of(group, group.bindings[a], name, values[name], 1)
            for a in group.lines
            if a != "loc"
        ]
        own = design_of(group, group.bindings["loc"], name, values[name], 0)
        parts.append(own.unsqueeze(-2))
        columns.append(_joined(parts, -2))
    for e in expansions:
        parts = []
        for a in group.lines:
            if a == "loc":
                continue
            coefficient = rows_of(group, arguments[a], 1).to(torch.float64)
            if (number, a) in e.children:
                parts.append(e.design(coefficient))
            else:
                parts.append(coefficient.new_zeros(1, 1, *coefficient.shape[2:], e.size))
        parts.append(parts[0].new_zeros(1, 1, parts[0].shape[2], 1, e.size))
        columns.append(_joined(parts, -2))
    return _joined(columns, -1)


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    shape = torch.broadcast_shapes(*(p.shape[:2] for p in parts))
    return torch.cat([p.expand(*shape, *p.shape[2:]) for p in parts], dim)


def _shared(
    design: Tensor, precision: Tensor, phi_phi: Tensor, weighed: Tensor
) -> tuple[Tensor, Tensor]:
    """One design for all rows: sums enter. The columns that each entry reads are few.

    Args:
        design: # (D, Q + 1, p)
        precision: # (D, D) or (D,)
        phi_phi: Σ w E[φ φᵀ]. # (Q + 1, Q + 1)
        weighed: P Σ w E[r φᵀ]. # (D, Q + 1)
    """
    p = design.shape[-1]
    if precision.dim() == 2:
        there = torch.einsum("de,eqp->dqp", precision, design)
        gram = torch.einsum("dqp,qr,drs->ps", design, phi_phi, there)
        return gram, torch.einsum("dqp,dq->p", design, weighed)
    read = (design != 0).any(1)
    width = max(int(read.sum(-1).max()), 1)
    columns = torch.argsort(read.to(torch.uint8), dim=-1, descending=True, stable=True)[:, :width]
    narrow = design.gather(-1, columns.unsqueeze(1).expand(-1, design.shape[1], -1))
    parts = narrow.mT @ phi_phi @ narrow * precision[:, None, None]
    places = columns.unsqueeze(-1) * p + columns.unsqueeze(-2)
    gram = design.new_zeros(p * p).index_add(0, places.reshape(-1), parts.reshape(-1))
    moment = (narrow * weighed.unsqueeze(-1)).sum(1)
    right = design.new_zeros(p).index_add(0, columns.reshape(-1), moment.reshape(-1))
    return gram.reshape(p, p), right


def _by_rows(
    design: Tensor, precision: Tensor, phi_phi: Tensor, r_phi: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Designs or precisions that differ between rows: a few coordinates of φ, some rows at a time.

    Args:
        design: # (rows or 1, D, Q + 1, p)
        precision: # (rows or 1, D, D) or (rows or 1, D)
        phi_phi: E[φ φᵀ]. # (rows, Q + 1, Q + 1)
        r_phi: E[r φᵀ]. # (rows, D, Q + 1)
        weights: # (rows,) or (rows, D)
    """
    rows, p = len(phi_phi), design.shape[-1]
    moves = (design != 0).any(1).any(0)  # which unknowns of the M-step move which coefficient
    columns = {a: moves[a].nonzero().reshape(-1) for a in range(len(moves)) if bool(moves[a].any())}
    gram, right = design.new_zeros(p, p), design.new_zeros(p)
    step = max(1, _MANY // max(1, design.shape[1] * max(len(columns), 1) * p))
    for begin in range(0, rows, step):
        part = slice(begin, min(begin + step, rows))

        def own(t: Tensor, part: slice = part) -> Tensor:
            return t if len(t) == 1 else t[part]

        n = part.stop - part.start
        J, P, w = own(design), own(precision), weights[part]
        w = w.unsqueeze(-1) if w.dim() == 1 else w
        r = _weighed(P, r_phi[part] * w.unsqueeze(-1))
        narrow = {a: J[:, :, a, c].expand(n, -1, -1) for a, c in columns.items()}
        for a, left in narrow.items():
            right.index_add_(0, columns[a], (left * r[:, :, a].unsqueeze(-1)).sum((0, 1)))
            for b, there in narrow.items():
                if b < a:  # the Gram matrix is symmetric
                    continue
                there = there * (w * phi_phi[part, a, b].unsqueeze(-1)).unsqueeze(-1)
                block = left.flatten(0, 1).mT @ _weighed(P, there).flatten(0, 1)
                gram[columns[a].unsqueeze(1), columns[b]] += block
                if b > a:
                    gram[columns[b].unsqueeze(1), columns[a]] += block.mT
    return gram, right
