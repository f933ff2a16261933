"""Elementwise functions of several parameters, as values: evaluated, and differentiated twice.

    a = f(θ_1, …, θ_L)     number by number: α / m,  m κ,  log m − σ² / 2

A jet holds f with ∂f/∂u_i and ∂²f/∂u_i ∂u_j. Each operation makes that of its result from those of its
operands, so that second derivatives are exact and cost a few operations on few numbers.

Source: Griewank and Walther (2008), "Evaluating Derivatives", section 3, for the rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

Number: TypeAlias = Tensor | float


@dataclass(frozen=True)
class Expression:
    """An elementwise function of leaves, which are parameters, and known numbers.

    Attributes:
        operation: ``"leaf"``, ``"known"`` or ``"number"``, or a name in `UNARY` or `BINARY`.
        of: What it is applied to.
        number: Which leaf or known tensor; the number; the exponent of a power.
    """

    operation: str
    of: tuple[Expression, ...] = ()
    number: float = 0.0

    def evaluate(self, leaves: Sequence[Tensor], known: Sequence[Tensor]) -> Number:
        """Its value, differentiable in the leaves.

        Args:
            leaves: Of one shape.
            known: Of the same shape.
        """
        match self.operation:
            case "leaf":
                return leaves[int(self.number)]
            case "known":
                return known[int(self.number)]
            case "number":
                return self.number
            case "power":
                base = self.of[0].evaluate(leaves, known)
                return base**self.number
        own = [e.evaluate(leaves, known) for e in self.of]
        if len(own) == 1:
            assert isinstance(own[0], Tensor)
            return UNARY[self.operation].forward(own[0])
        return BINARY[self.operation](own[0], own[1])

    def jet(self, leaves: Sequence[Jet], known: Sequence[Tensor]) -> Jet:
        """Its value with derivatives in the coordinates of the leaves.

        Args:
            leaves: See `Jet`.
            known: Of the shape of the leaves.
        """
        match self.operation:
            case "leaf":
                return leaves[int(self.number)]
            case "known":
                return Jet(known[int(self.number)])
            case "number":
                return Jet(self.number)
        own = [e.jet(leaves, known) for e in self.of]
        if self.operation == "power":
            x, e = own[0].value, self.number
            return own[0].through(x**e, e * x ** (e - 1), e * (e - 1) * x ** (e - 2))
        if len(own) == 1:
            assert isinstance(own[0].value, Tensor)
            return own[0].through(*UNARY[self.operation].derivatives(own[0].value))
        a, b = own
        match self.operation:
            case "add":
                return a.plus(b, 1.0)
            case "sub":
                return a.plus(b, -1.0)
            case "mul":
                return a.times(b)
        y = 1.0 / b.value
        return a.times(b.through(y, -y * y, 2 * y * y * y))


@dataclass(frozen=True, eq=False)
class Jet:
    """A number with its first and second derivatives in some coordinates; those left out are zero.

    Attributes:
        value: In one shape for all jets of an expression, or one number.
        first: By coordinate.
        second: By pairs of coordinates, the smaller first.
    """

    value: Number
    first: dict[int, Number] = field(default_factory=dict)
    second: dict[tuple[int, int], Number] = field(default_factory=dict)

    def through(self, value: Number, slope: Number, bend: Number) -> Jet:
        """The jet of g of it, from g, g' and g'' there."""
        first = {i: slope * x for i, x in self.first.items()}
        second: dict[tuple[int, int], Number] = {}
        for i, j in _pairs(self.first):
            found = bend * self.first[i] * self.first[j]
            own = self.second.get((i, j))
            second[i, j] = found if own is None else found + slope * own
        return Jet(value, first, second)

    def plus(self, other: Jet, sign: float) -> Jet:
        """The jet of a sum, or a difference."""
        return Jet(
            self.value + sign * other.value,
            _sum(self.first, other.first, sign),
            _sum(self.second, other.second, sign),
        )

    def times(self, other: Jet) -> Jet:
        """The jet of a product."""
        a, b = self.value, other.value
        first = _sum(_scaled(self.first, b), _scaled(other.first, a), 1.0)
        second = _sum(_scaled(self.second, b), _scaled(other.second, a), 1.0)
        for i, x in self.first.items():
            for j, y in other.first.items():
                pair = (min(i, j), max(i, j))
                more = x * y if i != j else 2 * x * y
                second[pair] = second[pair] + more if pair in second else more
        return Jet(a * b, first, second)

    def dense(self, count: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Value and derivatives in coordinates 0, …, count − 1. # (…), (…, L), (…, L, L)"""
        zero = torch.zeros_like(like)
        value = zero + self.value
        first = torch.stack([zero + self.first.get(i, 0.0) for i in range(count)], -1)
        second = [
            zero + self.second.get((min(i, j), max(i, j)), 0.0)
            for i in range(count)
            for j in range(count)
        ]
        return value, first, torch.stack(second, -1).unflatten(-1, (count, count))


def _pairs(first: Iterable[int]) -> list[tuple[int, int]]:
    own = sorted(first)
    return [(i, j) for n, i in enumerate(own) for j in own[n:]]


def _scaled(parts: dict[Any, Number], by: Number) -> dict[Any, Number]:
    return {key: x * by for key, x in parts.items()}


def _sum(a: dict[Any, Number], b: dict[Any, Number], sign: float) -> dict[Any, Number]:
    out = dict(a)
    for key, x in b.items():
        more = x if sign == 1.0 else sign * x
        out[key] = out[key] + more if key in out else more
    return out


@dataclass(frozen=True)
class Unary:
    """A smooth function of single numbers.

    Attributes:
        forward: The function, as torch computes it.
        derivatives: The function with its first and second derivative.
    """

    forward: Callable[[Tensor], Tensor]
    derivatives: Callable[[Tensor], tuple[Tensor, Number, Number]]


def _exp(x: Tensor) -> tuple[Tensor, Number, Number]:
    y = x.exp()
    return y, y, y


def _log(x: Tensor) -> tuple[Tensor, Number, Number]:
    inverse = x.reciprocal()
    return x.log(), inverse, -inverse * inverse


def _reciprocal(x: Tensor) -> tuple[Tensor, Number, Number]:
    y = x.reciprocal()
    return y, -y * y, 2 * y * y * y


def _sqrt(x: Tensor) -> tuple[Tensor, Number, Number]:
    y = x.sqrt()
    return y, 0.5 / y, -0.25 / (y * x)


def _rsqrt(x: Tensor) -> tuple[Tensor, Number, Number]:
    y = x.rsqrt()
    return y, -0.5 * y / x, 0.75 * y / (x * x)


def _sigmoid(x: Tensor) -> tuple[Tensor, Number, Number]:
    y = x.sigmoid()
    slope = y * (1 - y)
    return y, slope, slope * (1 - 2 * y)


def _softplus(x: Tensor) -> tuple[Tensor, Number, Number]:
    p = x.sigmoid()
    return torch.nn.functional.softplus(x), p, p * (1 - p)


def _log_sigmoid(x: Tensor) -> tuple[Tensor, Number, Number]:
    p = x.sigmoid()
    return torch.nn.functional.logsigmoid(x), 1 - p, -p * (1 - p)


def _expm1(x: Tensor) -> tuple[Tensor, Number, Number]:
    y = x.exp()
    return x.expm1(), y, y


def _log1p(x: Tensor) -> tuple[Tensor, Number, Number]:
    inverse = (1 + x).reciprocal()
    return x.log1p(), inverse, -inverse * inverse


def _lgamma(x: Tensor) -> tuple[Tensor, Number, Number]:
    return x.lgamma(), x.digamma(), torch.special.polygamma(1, x)


UNARY = {
    "exp": Unary(torch.exp, _exp),
    "log": Unary(torch.log, _log),
    "reciprocal": Unary(torch.reciprocal, _reciprocal),
    "sqrt": Unary(torch.sqrt, _sqrt),
    "rsqrt": Unary(torch.rsqrt, _rsqrt),
    "sigmoid": Unary(torch.sigmoid, _sigmoid),
    "softplus": Unary(torch.nn.functional.softplus, _softplus),
    "logsigmoid": Unary(torch.nn.functional.logsigmoid, _log_sigmoid),
    "expm1": Unary(torch.expm1, _expm1),
    "log1p": Unary(torch.log1p, _log1p),
    "lgamma": Unary(torch.lgamma, _lgamma),
    "neg": Unary(torch.neg, lambda x: (-x, -1.0, 0.0)),
}
"""Functions of one number, by the names of their nodes in lower case."""

BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
}
"""Functions of two numbers."""


def leaf(i: int) -> Expression:
    """Leaf number i."""
    return Expression("leaf", number=i)


def known(i: int) -> Expression:
    """Known tensor number i."""
    return Expression("known", number=i)


def number(x: float) -> Expression:
    """A number."""
    return Expression("number", number=x)
