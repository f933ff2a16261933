"""Predictors that are affine in parameters and in logarithms of some: ζ = J (w, log a) + offset.

    a · exp(−x·w)    has the logarithm    log a − x·w,

and logits x·w − log r are of the same form, as are those of m / (m + r) with m = exp(x·w). A product is
read factor by factor: an exponential of a linear predictor, a parameter as it stands, a known number. A
parameter enters either as it is or by its logarithm, and by the latter as one of its elements, with a
known power.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from pyro_em.graph.bindings.binding import LINKS, Binding
from pyro_em.graph.bindings.factored import factored, once
from pyro_em.graph.bindings.jacobian import Jacobian
from pyro_em.graph.bindings.nodes import (
    BILINEAR,
    LINEAR,
    VIEWS,
    Point,
    base_name,
    forward_maps,
    inputs_of,
    is_leaf,
    moved_below,
    point_at,
    through_views,
)
from pyro_em.graph.bindings.reached import Reached


class _NotRead(Exception):
    """The argument is of another form; its text says why."""


@dataclass(frozen=True, eq=False)
class _Term:
    """One term of a predictor.

    Attributes:
        point: Where it is: a linear function of parameters, or elements of a parameter.
        top: Which element of it each cell reads.
        power: What multiplies it.
        is_log: Whether its logarithm is the term.
    """

    point: Point
    top: Tensor
    power: float
    is_log: bool


def as_log_affine(reached: Reached, link: str) -> Binding | None:
    """An affine binding some of whose parameters enter by their logarithms; None where there is none.

    Args:
        reached: The argument.
        link: What makes the argument of the predictor: ``"exp"``, ``"sigmoid"``, or nothing.
    """
    point, top, constant = reached.point, reached.top, reached.constant
    terms: list[_Term] = []
    try:
        if link == "exp":
            _factors(point, top, constant, 1.0, terms)
        elif link == "sigmoid":
            _odds(point, top, constant, terms)
        elif link == "":
            _linear(point, top, constant, 1.0, terms)
        else:
            return None
        return _bound(terms, reached, link)
    except _NotRead:
        return None


def _bound(terms: Sequence[_Term], reached: Reached, link: str) -> Binding:
    """The terms as one binding."""
    constant, names, leaves = reached.constant, reached.names, reached.leaves
    name_of = {id(leaf): name for name, leaf in leaves.items()}
    jacobians: dict[str, Jacobian] = {}
    logs: list[str] = []
    for term in terms:
        within = [name_of[id(leaf)] for leaf in _leaves_of(term)]
        for name in within:
            if name in jacobians:
                raise _NotRead(f"'{name}' is in two terms")
            leaf = leaves[name]
            if not term.is_log:
                jacobians[name] = _slopes(term, leaf, constant, reached.plates, reached.max_cells)
                continue
            if len(within) > 1 or not bool((leaf > 0).all()):
                raise _NotRead("no positive parameter has a logarithm here")
            jacobians[name] = _selected(term, leaf, constant)
            logs.append(name)
    if set(jacobians) != set(names):
        raise _NotRead("a parameter is in no term")
    predictor = LINKS[link].inverse(constant)
    offset, size = predictor, predictor.abs()
    for name, jacobian in jacobians.items():
        theta = leaves[name].detach().reshape(-1).to(jacobian.dtype)
        theta = theta.log() if name in logs else theta
        offset = offset - jacobian @ theta
        size = size + replace(jacobian, value=jacobian.value.abs()) @ theta.abs()
    if not bool(torch.isfinite(offset).all()):
        raise _NotRead("a known factor is not positive")
    # What rounding left of a sum is no offset.
    if bool((offset.abs() <= 64 * torch.finfo(offset.dtype).eps * (1 + size)).all()):
        offset = offset.new_zeros(()).expand(offset.shape)
    own = {name: jacobians[name] for name in names}
    return Binding("affine", tuple(names), offset, jacobians=own, link=link, logs=tuple(logs))


def _factors(point: Point, top: Tensor, like: Tensor, power: float, terms: list[_Term]) -> None:
    """The terms of the logarithm of a product."""
    node = through_views(point.node)
    if is_leaf(node):
        terms.append(_Term(point, top, power, True))
        return
    base = base_name(node)
    if node.name() in VIEWS:
        raise _NotRead("several parameters are put together")
    if base == "Exp":
        _linear(*moved_below(point, node, inputs_of(node)[0], top, like), like, power, terms)
    elif base == "Reciprocal":
        _factors(*moved_below(point, node, inputs_of(node)[0], top, like), like, -power, terms)
    elif base in ("Mul", "Div"):
        for place, (parent, output) in enumerate(node.next_functions):
            if parent is None:
                continue
            sign = -power if base == "Div" and place == 1 else power
            below, own = _operand(point, node, (parent, output), top, like)
            _factors(below, own, like, sign, terms)
    else:
        raise _NotRead(f"no product ({base.lower()})")


def _odds(point: Point, top: Tensor, like: Tensor, terms: list[_Term]) -> None:
    """The terms of the logit of p / (p + q), which is log p − log q."""
    node = through_views(point.node)
    sides = inputs_of(node)
    if base_name(node) != "Div" or len(sides) != 2 or base_name(sides[1][0]) != "Add":
        raise _NotRead("no share of a sum")
    share, total = sides
    parts = inputs_of(total[0])
    if len(parts) != 2 or share not in parts or parts[0] == parts[1]:
        raise _NotRead("no share of a sum")
    other = parts[1] if parts[0] == share else parts[0]
    alpha = getattr(total[0], "_saved_alpha", 1)
    if alpha != 1:
        raise _NotRead("a share of another sum")
    _factors(*_operand(point, node, share, top, like), like, 1.0, terms)
    whole, own = _operand(point, node, total, top, like)
    _factors(*_operand(whole, total[0], other, own, like), like, -1.0, terms)


def _linear(point: Point, top: Tensor, like: Tensor, power: float, terms: list[_Term]) -> None:
    """A linear predictor, and the logarithms of parameters that stand in it."""
    terms.append(_Term(point, top, power, False))
    for log in _logs_below(point.node):
        below = inputs_of(log)[0]
        forward = forward_maps(point.edge, point.shape, GradientEdge(log, 0), like)
        ones = torch.ones((), dtype=like.dtype, device=like.device)
        slope = forward(ones).reshape(-1)[top]
        index = forward(None).reshape(-1)[top]
        factor = float(slope.reshape(-1)[0])
        place = (index / slope).round().long()
        if factor == 0 or not bool((slope == factor).all()):
            raise _NotRead("a logarithm is not one of each cell")
        shape = tuple(forward.source_shape)  # type: ignore[attr-defined]
        count = int(torch.Size(shape).numel())
        # Only one element of the logarithms may reach a cell: a mean of several has other slopes.
        probe = torch.rand(count, generator=torch.Generator().manual_seed(41)).to(slope)
        if not torch.allclose(
            forward(probe.reshape(shape)).reshape(-1)[top], factor * probe[place]
        ):
            raise _NotRead("several logarithms reach a cell")
        _factors(point_at(*below, shape), place, like, power * factor, terms)


def _operand(
    point: Point, node: Node, edge: tuple[Node, int], top: Tensor, like: Tensor
) -> tuple[Point, Tensor]:
    """One side of a product, which may be smaller than the product."""
    shape = tuple(node._input_metadata[0].shape)  # type: ignore[attr-defined]
    below, output = edge
    own = (
        tuple(below.variable.shape)  # type: ignore[attr-defined]
        if is_leaf(below)
        else tuple(below._input_metadata[output].shape)  # type: ignore[attr-defined]
    )
    here, top = moved_below(point, node, (node, 0), top, like)
    if here.shape != shape:
        raise _NotRead("a product of another shape")
    index = torch.arange(torch.Size(own).numel(), device=top.device).reshape(own)
    return point_at(below, output, own), index.expand(shape).reshape(-1)[top]


def _logs_below(top: Node) -> list[Node]:
    """Logarithms that a predictor reads, where all above them is linear."""
    seen: set[Node] = set()
    found: list[Node] = []
    stack = [top]
    while stack:
        node = stack.pop()
        if node in seen or is_leaf(node):
            continue
        seen.add(node)
        base, parents = base_name(node), inputs_of(node)
        if base == "Log":
            found.append(node)
            continue
        if node.name() not in VIEWS:
            if node.name() not in LINEAR:
                raise _NotRead(f"an operation that is not linear reaches it ({base.lower()})")
            sides = node.next_functions[1:] if base.startswith(("Addm", "Badd")) else parents
            if base in BILINEAR and sum(n is not None for n, _ in sides) > 1:
                raise _NotRead("a product of parameters reaches it")
            if base == "Div" and node.next_functions[0][0] is None:
                raise _NotRead("a division by a parameter reaches it")
        stack.extend(n for n, _ in parents)
    return found


def _leaves_of(term: _Term) -> list[Tensor]:
    """The leaves of a term, those below logarithms left out of a linear one."""
    seen: dict[Node, None] = {}
    stack = [term.point.node]
    out: list[Tensor] = []
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen[node] = None
        if is_leaf(node):
            out.append(node.variable)  # type: ignore[attr-defined]
        elif term.is_log or base_name(node) != "Log":
            stack.extend(n for n, _ in inputs_of(node))
    return out


def _slopes(term: _Term, leaf: Tensor, like: Tensor, plates: int, max_cells: int) -> Jacobian:
    """The derivative of a linear term in one parameter."""
    found = factored(term.point, term.top, leaf, like, plates, max_cells)
    if found is None:
        if leaf.numel() * like.numel() > max_cells:
            raise _NotRead("its Jacobian would have too many cells")
        forward = forward_maps(term.point.edge, term.point.shape, leaf, like)
        columns = []
        for j in range(leaf.numel()):
            unit = torch.zeros(leaf.numel(), dtype=leaf.dtype, device=leaf.device)
            unit[j] = 1
            columns.append(once(forward(unit.reshape(leaf.shape)).reshape(-1)[term.top]))
        value = torch.stack(torch.broadcast_tensors(*columns), -1)
        found = Jacobian.of(value.expand(*term.top.shape, leaf.numel()))
    return found if term.power == 1 else replace(found, value=found.value * term.power)


def _selected(term: _Term, leaf: Tensor, like: Tensor) -> Jacobian:
    """That of a logarithm: a power at the one element that a cell reads."""
    point, top = term.point, term.top
    if is_leaf(point.node):
        index = torch.arange(leaf.numel(), device=leaf.device)
    else:
        forward = forward_maps(point.edge, point.shape, leaf, like)
        index = forward(None).round().long().reshape(-1)
    index = once(index[top]).expand(top.shape).unsqueeze(-1)
    value = like.new_full((), term.power).expand(index.shape)
    return Jacobian(value, index, leaf.numel())
