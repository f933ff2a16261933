"""Arguments in which several parameters meet, number by number: α / m, m κ, log m − σ² / 2.

Every node between the argument and the parameters is a view or an elementwise operation. Views say
which element of a parameter each cell reads; operations become an expression. A product or a quotient
shows the constant that it multiplies by; a sum does not, and what it adds is what is left of its value
where that is known. Such numbers are held against a run at other parameters, as those of all bindings
are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from pyro_em.graph.bindings.binding import Binding, Selection
from pyro_em.graph.bindings.expression import UNARY, Expression, known, leaf, number
from pyro_em.graph.bindings.nodes import (
    VIEWS,
    Point,
    base_name,
    forward_maps,
    inputs_of,
    is_leaf,
    nodes_below,
    output_shape,
    point_at,
)
from pyro_em.graph.bindings.reached import Reached

_MANY = 64  # nodes of an expression that is read

_DIGITS = 6  # decimals of a number that a user may have written


class _Unread(Exception):
    """A graph that is no elementwise function of elements of parameters, and why."""


def as_composite(reached: Reached) -> Binding | None:
    """An elementwise function of elements of several parameters, or None.

    Args:
        reached: The argument.
    """
    point, constant = reached.point, reached.constant
    names, leaves = reached.names, reached.leaves
    if len(names) < 2 or len(nodes_below(point.node)) > _MANY:
        return None
    reader = _Reader(constant, leaves)
    try:
        expression = reader.read(point, reached.top, constant)
    except _Unread:
        return None
    if {s.param for s in reader.selections} != set(names):
        return None
    binding = Binding(
        "composite",
        tuple(names),
        constant,
        tuple(reader.selections),
        expression=expression,
        known=tuple(reader.known),
    )
    found = binding.evaluate({name: leaves[name].detach() for name in names})
    near = torch.isclose(found.to(constant), constant, rtol=1e-5, atol=1e-7)
    return binding if bool(near.all()) else None


class _Reader:
    """Reads one argument.

    Args:
        like: The argument, for dtype and device.
        leaves: The leaf tensor of each parameter.

    Attributes:
        selections: The elements of parameters that the expression reads.
        known: The tensors that it knows.
    """

    def __init__(self, like: Tensor, leaves: Mapping[str, Tensor]) -> None:
        self.like, self.leaves = like, leaves
        self.names = {id(t): name for name, t in leaves.items()}
        self.selections: list[Selection] = []
        self.known: list[Tensor] = []

    def read(self, point: Point, top: Tensor, value: Tensor | None) -> Expression:
        """What stands at a place of the graph.

        Args:
            point: The place.
            top: Which of its elements each cell is.
            value: Its value at the cells, where that is known.
        """
        point, top = self._below_views(point, top)
        node = point.node
        if is_leaf(node):
            return self._leaf(node, top)
        base = base_name(node)
        slots = [n for n, _ in node.next_functions]
        if base in ("Mul", "Div"):
            return self._product(point, base, slots, top, value)
        if base in ("Add", "Sub", "Rsub"):
            return self._sum(point, base, slots, top, value)
        if base == "Pow" and len(inputs_of(node)) == 1:
            exponent = float(getattr(node, "_saved_exponent", math.nan))
            if not math.isfinite(exponent):
                raise _Unread
            return Expression("power", (self._child(point, 0, top, None),), exponent)
        name = base.lower()
        if name not in UNARY or len(slots) != 1:
            raise _Unread
        if name == "softplus" and getattr(node, "_saved_beta", 1) != 1:
            raise _Unread
        before = getattr(node, "_saved_self", None)
        if before is not None:
            before = self._at(before, point, top)
        elif name == "exp" and value is not None:
            before = value.log()
        return Expression(name, (self._child(point, 0, top, before),))

    def _leaf(self, node: Node, top: Tensor) -> Expression:
        name = self.names[id(node.variable)]  # type: ignore[attr-defined]
        for i, s in enumerate(self.selections):
            if s.param == name and torch.equal(s.index, top):
                return leaf(i)
        self.selections.append(Selection(name, top))
        return leaf(len(self.selections) - 1)

    def _below_views(self, point: Point, top: Tensor) -> tuple[Point, Tensor]:
        """The place that is read through views, one whole input of each."""
        while not is_leaf(point.node) and point.node.name() in VIEWS:
            parents = dict.fromkeys(inputs_of(point.node))
            for parent, output in parents:
                below = point_at(parent, output, output_shape(parent, output))
                source = below.edge if is_leaf(parent) else GradientEdge(parent, output)
                forward = forward_maps(point.edge, point.shape, source, self.like)
                one = torch.ones((), dtype=self.like.dtype, device=self.like.device)
                slope = forward(one).reshape(-1)[top]
                if not bool((slope != 0).any()):
                    continue
                if not bool((slope == 1).all()):
                    raise _Unread
                top = forward(None).round().long().reshape(-1)[top]
                point = below
                break
            else:
                raise _Unread
        return point, top

    def _child(self, point: Point, slot: int, top: Tensor, value: Tensor | None) -> Expression:
        """What an operation reads, at the cells of its result."""
        parent, output = point.node.next_functions[slot]
        assert parent is not None
        shape = output_shape(parent, output)
        own = torch.arange(math.prod(shape), device=top.device).reshape(shape)
        own = own.expand(point.shape).reshape(-1)[top]
        return self.read(point_at(parent, output, shape), own, value)

    def _at(self, saved: Tensor, point: Point, top: Tensor) -> Tensor:
        """A tensor that an operation saved, at the cells of its result."""
        return saved.detach().expand(point.shape).reshape(-1)[top]

    def _product(
        self, point: Point, base: str, slots: list, top: Tensor, value: Tensor | None
    ) -> Expression:
        node = point.node
        saved = [getattr(node, f"_saved_{name}", None) for name in ("self", "other")]
        values = [None if t is None else self._at(t, point, top) for t in saved]
        parts = []
        for slot in (0, 1):
            own, other = values[slot], values[1 - slot]
            if slots[slot] is None:
                if own is None:
                    raise _Unread
                parts.append(self._constant(own))
                continue
            if own is None and value is not None and other is not None:
                own = value / other if base == "Mul" else value * other
            parts.append(self._child(point, slot, top, own))
        return Expression(base.lower(), tuple(parts))

    def _sum(
        self, point: Point, base: str, slots: list, top: Tensor, value: Tensor | None
    ) -> Expression:
        if getattr(point.node, "_saved_alpha", 1) != 1:
            raise _Unread
        sign = -1.0 if base == "Sub" else 1.0
        if base == "Rsub":  # written as other − self
            x = self._child(point, 0, top, None)
            if len(slots) > 1 and slots[1] is not None:
                return Expression("sub", (self._child(point, 1, top, None), x))
            return Expression("sub", (self._rest(value, x, lambda v, a: v + a), x))
        if len(slots) > 1 and slots[0] is not None and slots[1] is not None:
            return Expression(base.lower(), self._both(point, top, value, sign))
        if slots[0] is not None:
            x = self._child(point, 0, top, None)
            rest = self._rest(value, x, lambda v, a: v - a)
            return Expression("add", (x, rest))
        x = self._child(point, 1, top, None)
        rest = self._rest(value, x, lambda v, a: v - sign * a)
        return Expression(base.lower(), (rest, x))

    def _both(
        self, point: Point, top: Tensor, value: Tensor | None, sign: float
    ) -> tuple[Expression, Expression]:
        """Two terms, one of which may hold a constant that only the sum shows."""
        held = len(self.selections), len(self.known)
        try:
            a = self._child(point, 0, top, None)
        except _Unread:
            del self.selections[held[0] :], self.known[held[1] :]
            b = self._child(point, 1, top, None)
            own = None if value is None else value - sign * self._value(b)
            return self._child(point, 0, top, own), b
        own = None if value is None else sign * (value - self._value(a))
        return a, self._child(point, 1, top, own)

    def _rest(
        self,
        value: Tensor | None,
        x: Expression,
        of: Callable[[Tensor, Tensor], Tensor],
    ) -> Expression:
        """The constant of a sum, from its value and what it is added to."""
        if value is None:
            raise _Unread
        there = self._value(x)
        size = torch.maximum(value.abs(), there.abs())
        return self._constant(of(value, there), 64 * torch.finfo(value.dtype).eps * size)

    def _value(self, x: Expression) -> Tensor:
        """The value of what has been read, at the present parameters."""
        found = x.evaluate(
            [self.leaves[s.param].detach().reshape(-1)[s.index] for s in self.selections],
            self.known,
        )
        assert isinstance(found, Tensor)
        return found

    def _constant(self, value: Tensor, noise: Tensor | None = None) -> Expression:
        """A known number, as it was written where rounding hides that; else a known tensor."""
        first = value.reshape(-1)[0]
        if noise is None:
            if bool((value == first).all()):
                return number(float(first))
        else:
            for digits in range(_DIGITS + 1):
                written = round(float(first), digits)
                if bool(((value - written).abs() <= noise).all()):
                    return number(written)
        self.known.append(value.to(self.like.dtype))
        return known(len(self.known) - 1)
