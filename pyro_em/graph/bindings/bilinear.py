"""Arguments that are linear in each of several parameters while the others have values.

    a(θ) = c + Σ_p J_p θ_p + Σ_{p<q} T_pq (θ_p ⊗ θ_q)

An autoregression about a mean, μ + φ (x_{t−1} − μ), is one. No parameter is multiplied by itself, and
no product has more than two factors: which parameters each term has is followed from the leaves of the
autograd graph upward. T_pq are second derivatives, which such an argument has at all values the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import torch
from torch import Tensor
from torch.autograd.graph import Node

from pyro_em.graph.bindings.binding import Binding, outer
from pyro_em.graph.bindings.jacobian import Jacobian
from pyro_em.graph.bindings.linearity import parents_first
from pyro_em.graph.bindings.nodes import (
    BILINEAR,
    LINEAR,
    VIEWS,
    Point,
    base_name,
    below_normalisation,
    forward_maps,
    is_leaf,
)
from pyro_em.graph.bindings.reached import Reached
from pyro_em.tracing.without_sympy import pull_back

_FEW = 2**10  # numbers that two parameters have together, each of which costs a pass

Term = frozenset[str]


def as_bilinear(reached: Reached, *, normalised: str = "") -> Binding | None:
    """A binding that is linear in each parameter given the others; None where there is none.

    Args:
        reached: The argument.
        normalised: How the distribution normalises its rows, if it does.
    """
    point, top, constant = reached.point, reached.top, reached.constant
    names, leaves = reached.names, reached.leaves
    if below_normalisation(point, top, constant, normalised)[2]:
        return None
    terms = _terms(point.node, {id(leaves[n]): n for n in names})
    if terms is None or all(len(t) < 2 for t in terms):
        return None
    products = [pair for pair in combinations(names, 2) if frozenset(pair) in terms]
    numbers = [leaves[p].numel() * leaves[q].numel() for p, q in products]
    if max(numbers) > _FEW or sum(numbers) * constant.numel() > reached.max_cells:
        return None
    pairs = {(p, q): _mixed(point, top, leaves[p], leaves[q], constant) for p, q in products}
    values = {n: leaves[n].detach() for n in names}
    jacobians = {}
    for name in names:
        slopes = _slopes(point, top, leaves[name], constant)
        for (p, q), mixed in pairs.items():
            if name in (p, q):
                slopes = slopes - _given(mixed, values, p, q, name)
        jacobians[name] = Jacobian.of(_without_noise(slopes))
    found = Binding(
        "bilinear",
        tuple(names),
        constant.new_zeros(()).expand(constant.shape),
        jacobians=jacobians,
        pairs=pairs,
    )
    rest = constant - found.evaluate(values)
    noise = 256 * torch.finfo(constant.dtype).eps * _size(found, values)
    rest = torch.where(rest.abs() <= noise, torch.zeros_like(rest), rest)
    return Binding("bilinear", tuple(names), rest, jacobians=jacobians, pairs=pairs)


def _terms(top: Node, names: Mapping[int, str]) -> set[Term] | None:
    """Which parameters each term of a sum of products has; None where it is no such sum."""
    found: dict[Node, set[Term]] = {}
    for node in parents_first(top):
        if is_leaf(node):
            name = names.get(id(node.variable))  # type: ignore[attr-defined]
            found[node] = set() if name is None else {frozenset([name])}
            continue
        sides = [set() if n is None else found[n] for n, _ in node.next_functions]
        is_view, base = node.name() in VIEWS, base_name(node)
        if not is_view and node.name() not in LINEAR:
            return None
        if is_view or base not in BILINEAR:
            found[node] = set().union(*sides)
            continue
        if base == "Div":
            if any(sides[1:]):
                return None
            found[node] = sides[0]
            continue
        added = 1 if base.startswith("Addm") or base == "Baddbmm" else 0
        factors = [s for s in sides[added:] if s]
        out = set().union(*sides[:added])
        if len(factors) == 2:
            for a in factors[0]:
                for b in factors[1]:
                    if a & b or len(a | b) > 2:
                        return None
                    out.add(a | b)
        else:
            out = out.union(*factors)
        found[node] = out
    return found[top]


def _slopes(point: Point, top: Tensor, leaf: Tensor, like: Tensor) -> Tensor:
    """∂a/∂θ at the present values. # (*argument, leaf.numel())"""
    forward = forward_maps(point.edge, point.shape, leaf, like)
    columns = [forward(unit).detach().reshape(-1)[top] for unit in _units(leaf)]
    return torch.stack(columns, -1)


def _mixed(point: Point, top: Tensor, p: Tensor, q: Tensor, like: Tensor) -> Jacobian:
    """∂²a/∂θ_p ∂θ_q. # (*argument, p.numel() * q.numel())"""
    v = torch.zeros(point.shape, dtype=like.dtype, device=like.device, requires_grad=True)
    first = pull_back(point.edge, p, v, create_graph=True)
    assert first is not None
    columns = []
    for unit in _units(p):
        second = pull_back(first, q, unit, create_graph=True, allow_unused=True)
        for other in _units(q):
            column = None
            if second is not None and second.requires_grad:
                column = pull_back(second, v, other, allow_unused=True)
            column = torch.zeros_like(v) if column is None else column
            columns.append(column.detach().reshape(-1)[top])
    return Jacobian.of(torch.stack(columns, -1))


def _units(leaf: Tensor) -> list[Tensor]:
    eye = torch.eye(leaf.numel(), dtype=leaf.dtype, device=leaf.device)
    return [row.reshape(leaf.shape) for row in eye]


def _given(mixed: Jacobian, values: Mapping[str, Tensor], p: str, q: str, name: str) -> Tensor:
    """What a product adds to the slopes in one of its factors, at a value of the other."""
    table = mixed.value.reshape(*mixed.value.shape[:-1], values[p].numel(), values[q].numel())
    other = values[q if name == p else p].reshape(-1).to(table.dtype)
    return table @ other if name == p else table.mT @ other


def _without_noise(slopes: Tensor) -> Tensor:
    """Slopes, zero where they are what is left of the difference of two numbers."""
    noise = 64 * torch.finfo(slopes.dtype).eps * max(1.0, float(slopes.abs().max()))
    return torch.where(slopes.abs() <= noise, torch.zeros_like(slopes), slopes)


def _size(binding: Binding, values: Mapping[str, Tensor]) -> Tensor:
    """The sum of the magnitudes of all terms. # (*argument,)"""
    size = torch.zeros_like(binding.constant)
    for name, jacobian in (binding.jacobians or {}).items():
        size = size + jacobian.value.abs() @ values[name].reshape(-1).abs().to(jacobian.dtype)
    for pair, jacobian in (binding.pairs or {}).items():
        both = outer(values, pair)
        size = size + jacobian.value.abs() @ both.abs().to(jacobian.dtype)
    return size
