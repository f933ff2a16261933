"""What every functional form answers: the protocol of `pyro_em.families.forms`.

A form is a function of one argument a, given a numerator n and a denominator d that a rule makes of
sums over the data. It knows its maximiser, its value, what a collapse is, and where its solutions lie;
whoever solves M-steps asks it, and never which form it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import constraints


@dataclass(frozen=True)
class Curve:
    """An expected log density at predictors η.

    Attributes:
        value: Of each cell, up to a term free of η, in nats. # (*cells)
        slope: Its derivative in η. # (*cells, *event)
        curvature: Minus the second derivative. Of a row it is diag(c) − c cᵀ / Σ c for these numbers
            c. # (*cells, *event)
    """

    value: Tensor
    slope: Tensor
    curvature: Tensor


class Form:
    """One functional form; the methods are of forms with a maximiser from sums.

    Attributes:
        event_dim: Rightmost dimensions of one solution: a number, a vector or a matrix.
        is_location: Whether the argument is updated before the family's spread.
        is_spread: Whether zero is a collapse rather than a value.
        is_whole: Whether the form is all that the family's density is, free terms apart.
        scales: Whether a known positive factor on the argument keeps the form.
        interval: Where the elements of a solution lie.
        is_row: Whether one solution is a row of probabilities: its elements sum to one, may stand in
            any order in the parameter, and need no data.
        is_regressed: Whether coefficients of an affine argument are solved for by least squares.
        is_gram: Whether a solution may be written as A Aᵀ, with a parameter A that is any factor of it.
        is_average: Whether the solution is the weighted mean of the data where every cell has a value
            of its own, whatever the family's spread.
        needs_data: Whether the maximiser needs the data themselves, not only sums over them.
        end: −1 or 1 where the maximiser is the smallest or the largest datum that has weight: an end of
            the support. Zero for all others.
        is_log_linear: Whether the expected log density is linear in log a, and in log(1 − a) where
            the form `has_complement`, and in −a where it `has_rate`; see `features`.
        has_complement: See ``is_log_linear``.
        has_rate: See ``is_log_linear``.
        inverse_link: What makes a natural value of a predictor η in which the expected log density is
            concave (see `of_predictor`): ``"exp"``, ``"sigmoid"`` or ``"softmax"``; empty for none.
    """

    event_dim: ClassVar[int] = 0
    is_location: ClassVar[bool] = False
    is_spread: ClassVar[bool] = False
    is_whole: ClassVar[bool] = False
    scales: ClassVar[bool] = False
    interval: ClassVar[tuple[float, float]] = (-math.inf, math.inf)
    is_row: ClassVar[bool] = False
    is_regressed: ClassVar[bool] = False
    is_gram: ClassVar[bool] = False
    is_average: ClassVar[bool] = False
    needs_data: ClassVar[bool] = False
    end: ClassVar[int] = 0
    is_log_linear: ClassVar[bool] = False
    has_complement: ClassVar[bool] = False
    has_rate: ClassVar[bool] = False
    inverse_link: ClassVar[str] = ""

    def solve(self, n: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        """The maximiser, and which events had no mass. # (events, *event), (events,)

        Args:
            n: Numerators. # (events, *event)
            d: Denominators. # (events, *event or 1s)
        """
        massless = self.massless(n, d)
        shape = (-1,) + (1,) * (d.dim() - 1)
        ratio = n / torch.where(massless.reshape(shape), 1.0, d)
        return self._maximiser(ratio), massless

    def massless(self, n: Tensor, d: Tensor) -> Tensor:
        """Which events had no mass. # (events,)"""
        return ~(d.reshape(d.shape[0], -1).amax(-1) > 0)

    def _maximiser(self, ratio: Tensor) -> Tensor:
        return ratio

    def expected(self, n: Tensor, d: Tensor, a: Tensor) -> Tensor:
        """The expected log density up to a term free of the argument, over all cells, in nats.

        Args:
            n: Numerators. # (*cells, *event)
            d: Denominators. # (*cells, *event or 1s)
            a: Natural values. # (*cells or 1s, *event)
        """
        raise NotImplementedError(f"the form of {type(self).__name__} is no whole density")

    def exposed(self, n: Tensor, d: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        """Numerator and denominator for a parameter that a known positive factor multiplies."""
        return n * factor, d * factor**2

    def outside(self, n: Tensor, d: Tensor) -> Tensor | None:
        """What is negative where a prior makes the form unbounded at the boundary; None where none can.

        # (events,) or (events, *event)
        """
        return None

    def floored(self, a: Tensor, floor: float) -> tuple[Tensor, Tensor]:
        """Spreads raised to a floor on the variance, and which of them were below it."""
        raise NotImplementedError(f"{type(self).__name__} is no spread")

    def collapsed(
        self, a: Tensor, before: Tensor, mass: Tensor, magnitude: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Which spreads are none any more, and their variances, for a message. # (events,) each

        Args:
            a: Spreads that an M-step found. # (events, *event)
            before: Those before it. # (events, *event)
            mass: Data behind each. # (events,)
            magnitude: What their rounding is relative to. # (events,) or (events, D)
        """
        raise NotImplementedError(f"{type(self).__name__} is no spread")

    def filler(self, like: Tensor) -> Tensor:
        """Any feasible natural values, for events that are kept as they were."""
        return torch.ones_like(like)

    def stays_in(self, constraint: constraints.Constraint, link: str) -> bool:
        """Whether every solution that is a row or a matrix satisfies a parameter's constraint.

        Args:
            constraint: The constraint, with a meaning for rows or matrices.
            link: Name of the link from the natural value to the parameter.
        """
        return False

    def of_data(self, x: Tensor, w: Tensor) -> Tensor:
        """The maximiser of a form that `needs_data`; its rule gives data and weights. # ()

        Args:
            x: Data. # (data,)
            w: Their weights, not all of them zero. # (data,)
        """
        raise NotImplementedError(f"{type(self).__name__} is solved from sums")

    def features(self, n: Tensor, d: Tensor) -> tuple[Tensor, ...]:
        """What multiplies `natural_parameters` in a log-linear form. # like n, each

        Args:
            n: Numerators. # (*cells, *event)
            d: Denominators. # like n; of a row of probabilities unused
        """
        raise NotImplementedError(f"the form of {type(self).__name__} is not linear in logarithms")

    def natural_parameters(self, a: Tensor) -> tuple[Tensor, ...]:
        """The functions of the argument in which a log-linear form is linear. # like a, each"""
        terms = [a.log()]
        if self.has_complement:
            terms.append((1 - a).log())
        if self.has_rate:
            terms.append(-a)
        return tuple(terms)

    def of_predictor(self, n: Tensor, d: Tensor, eta: Tensor) -> Curve:
        """The expected log density in a predictor, with its derivatives.

        Args:
            n: Numerators. # (*cells, *event)
            d: Denominators. # (*cells, *event or 1s)
            eta: Predictors. # (*cells, *event)
        """
        raise NotImplementedError(f"the form of {type(self).__name__} has no predictor")

    def inside(self, like: Tensor, which: int) -> Tensor:
        """One of two natural values inside the domain of a log-linear form.

        Args:
            like: Of the shape, the dtype and the device that are wanted. # (*cells, *event)
            which: 0 or 1.
        """
        return torch.full_like(like, (0.3, 0.6)[which])


class Spread(Form):
    """A form whose collapse to zero is no estimate."""

    is_spread = True
    interval = (0.0, math.inf)
    words: ClassVar[str] = "its variance collapses: it would become"

    def _variance(self, a: Tensor) -> Tensor:
        return a

    def floored(self, a: Tensor, floor: float) -> tuple[Tensor, Tensor]:
        """See `Form.floored`."""
        least = self._least(floor)
        return a.clamp(min=least), a < least

    def _least(self, floor: float) -> float:
        return floor

    def collapsed(
        self, a: Tensor, before: Tensor, mass: Tensor, magnitude: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `Form.collapsed`."""
        eps = torch.finfo(a.dtype).eps
        variance = self._variance(a)
        few = (mass < 1.5) & (variance < 1e-8 * self._variance(before))
        return (a <= 8 * eps * magnitude.to(a.dtype)) | (a == 0) | few, variance
