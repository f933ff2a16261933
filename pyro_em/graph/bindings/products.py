"""Covariances made of parameters: matrices A Aᵀ, and sums of these and of selections.

    Σ = A Aᵀ,     Σ = W Wᵀ + diag(ψ),     Σ = A Aᵀ + ε I

A product of a matrix with its own transpose is a map of the matrix: both factors are read, and have to
select the same elements, one of them transposed. In a sum each term is read by itself; what is left of
the argument is its constant. Numbers that an operation does not show are held against a run at other
parameters, as those of all bindings are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from pyro_em.graph.bindings.binding import PRODUCT, Binding, Selection
from pyro_em.graph.bindings.nodes import (
    Point,
    base_name,
    forward_maps,
    inputs_of,
    is_leaf,
    output_shape,
    point_at,
    read_maps,
    through_views,
    variables_below,
)
from pyro_em.graph.bindings.reached import Reached
from pyro_em.graph.bindings.selections import is_right

Leaves = Mapping[str, Tensor]


def as_product(reached: Reached) -> Binding | None:
    """A selection of whole matrices A Aᵀ with as many rows as columns in A, or None.

    Args:
        reached: The argument, whose value has (*batch, D, D).
    """
    constant, names, leaves = reached.constant, reached.names, reached.leaves
    parts = _product(reached.point, reached.top, constant, leaves)
    if parts is None or any(p.index.shape != constant.shape for p in parts):
        return None
    binding = Binding("selection", tuple(names), constant, parts)
    whole = torch.stack([p.index >= 0 for p in parts]).any(0)
    same = {p.param for p in parts} == set(names)
    return binding if same and bool(whole.all()) and is_right(binding, leaves) else None


def as_sum(reached: Reached) -> Binding | None:
    """A sum of products, selections and a constant, or None; see `as_product`."""
    constant, names, leaves = reached.constant, reached.names, reached.leaves
    parts: list[Selection] = []
    for at, where in _terms(reached.point, reached.top, constant):
        found = _product(at, where, constant, leaves) or _selected(at, where, constant, leaves)
        if found is None:
            return None
        parts += found
    if not parts or {p.param for p in parts} != set(names):
        return None
    none = torch.zeros_like(constant)
    values = {n: leaves[n].detach() for n in names}
    total = Binding("sum", tuple(names), none, tuple(parts)).evaluate(values)
    rest = constant - total
    noise = 64 * torch.finfo(constant.dtype).eps * float(constant.abs().max())
    rest = torch.where(rest.abs() <= noise, none, rest)
    return Binding("sum", tuple(names), rest, tuple(parts))


def _terms(point: Point, top: Tensor, like: Tensor) -> Iterator[tuple[Point, Tensor]]:
    """The terms of a sum that parameters reach, and which element of each every cell is."""
    node = through_views(point.node)
    if is_leaf(node) or base_name(node) != "Add" or getattr(node, "_saved_alpha", 1) != 1:
        yield point, top
        return
    whole = output_shape(node)
    if node is not point.node:
        forward = forward_maps(point.edge, point.shape, GradientEdge(node, 0), like)
        top = forward(None).round().long().reshape(-1)[top]
    for parent, output in inputs_of(node):
        shape = output_shape(parent, output)
        own = torch.arange(math.prod(shape), device=top.device).reshape(shape)
        yield from _terms(point_at(parent, output, shape), own.expand(whole).reshape(-1)[top], like)


def _product(
    point: Point, top: Tensor, like: Tensor, leaves: Leaves
) -> tuple[Selection, ...] | None:
    """The matrices A of a product A Aᵀ at the cells of an argument. # (*batch, D, q) each"""
    node = through_views(point.node)
    if is_leaf(node) or base_name(node) not in ("Mm", "Bmm") or len(inputs_of(node)) != 2:
        return None
    shapes = [tuple(getattr(node, f"_saved_{name}").shape) for name in ("self", "mat2")]
    D, q = shapes[0][-2:]
    if shapes[1][-2:] != (q, D) or tuple(top.shape[-2:]) != (D, D):
        return None
    if node is not point.node:
        forward = forward_maps(point.edge, point.shape, GradientEdge(node, 0), like)
        top = forward(None).round().long().reshape(-1)[top]
    cells = top.reshape(-1, D, D)
    each = torch.arange(D * D, device=top.device).reshape(D, D)
    offset, matrix = cells - cells[:, :1, :1], cells[:, 0, 0]
    in_order = bool((offset == each).all()) or bool((offset == each.mT).all())
    if bool((matrix % (D * D) != 0).any()) or not in_order:
        return None
    read = []
    for (parent, output), shape in zip(inputs_of(node), shapes, strict=True):
        own = torch.arange(math.prod(shape), device=top.device).reshape(shape)
        read.append(_selected(point_at(parent, output, shape), own, like, leaves))
    left, right = read
    if left is None or right is None or len(left) != len(right):
        return None
    parts = []
    for a, b in zip(left, right, strict=True):
        alike = a.param == b.param and [m.name for m in a.maps] == [m.name for m in b.maps]
        if not alike or a.factor is not None or b.factor is not None:
            return None
        if bool((a.index < 0).any()) or not torch.equal(a.index, b.index.mT):
            return None
        matrices = a.index.reshape(-1, D * q)[matrix // (D * D)]
        parts.append(Selection(a.param, matrices.reshape(*top.shape[:-1], q), (*a.maps, PRODUCT)))
    return tuple(parts)


def _selected(
    point: Point, top: Tensor, like: Tensor, leaves: Leaves
) -> tuple[Selection, ...] | None:
    """The elements of parameters that are the elements of a term, whose value is not at hand."""
    maps, has_factor, problem = read_maps(point.node)
    if problem:
        return None
    parts, covered = [], torch.zeros(point.shape, dtype=torch.bool, device=like.device)
    below = set(map(id, variables_below(point.node)))
    for name, leaf in leaves.items():
        if id(leaf) not in below:
            continue
        if point.edge is leaf:
            index = torch.arange(leaf.numel(), device=leaf.device).reshape(leaf.shape)
            slope = torch.ones(leaf.shape, dtype=like.dtype, device=leaf.device)
        else:
            forward = forward_maps(point.edge, point.shape, leaf, like)
            slope = forward(torch.ones((), dtype=like.dtype, device=like.device))
            ratio = forward(None) / torch.where(slope != 0, slope, 1.0)
            index = torch.where(slope != 0, ratio.round(), -1).long()
        used = index >= 0
        if not bool(used.any()):
            continue
        if not bool(torch.isfinite(slope).all()) or bool((used & covered).any()):
            return None
        covered |= used
        factor = None
        if has_factor:
            with torch.enable_grad():
                x = leaf.detach().reshape(-1)[index.clamp(min=0)].requires_grad_()
                y = x
                for m in maps:
                    y = m.forward(y)
                (own,) = torch.autograd.grad(y.sum(), x)
            factor = torch.where(used, slope / own.to(slope), 1.0)
            if not bool((torch.isfinite(factor) & (factor > 0)).all()):
                return None
            factor = factor.reshape(-1)[top]
        parts.append(Selection(name, index.reshape(-1)[top], maps, factor))
    return tuple(parts) or None
