"""The functional forms that an expected log density has in one argument, each with its maximiser.

Given the numerator n and the denominator d that a rule makes of sums over the data:

    mean            −½ d a² + n a                          n / d
    scale           −d log a − n / (2 a²)                  √(n / d)
    absolute scale  −d log a − n / a                       n / d
    probability     n log a + (d − n) log(1 − a)           n / d
    rate            n log a − d a                          n / d
    simplex         Σ_k n_k log a_k                        n / Σ n
    mean vector     −½ aᵀ d a + nᵀ a                       d⁻¹ n
    covariance      −½ d log det a − ½ tr(a⁻¹ n)           n / d
    median          −Σ_i w_i abs(x_i − a)                  from the data, not from sums

To add a form, add a class with these methods and a member to `Kind`: nothing else in the library asks
which form it is, only what the form says of itself.
"""

from __future__ import annotations

import math
from enum import Enum
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em.distributions import bounds


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
        is_average: Whether the solution is the weighted mean of the data where every cell has a value
            of its own, whatever the family's spread.
        needs_data: Whether the maximiser needs the data themselves, not only sums over them.
        is_log_linear: Whether the expected log density is linear in log a, and in log(1 − a) where
            the form `has_complement`, and in −a where it `has_rate`; see `features`.
        has_complement: See ``is_log_linear``.
        has_rate: See ``is_log_linear``.
    """

    event_dim: ClassVar[int] = 0
    is_location: ClassVar[bool] = False
    is_spread: ClassVar[bool] = False
    is_whole: ClassVar[bool] = False
    scales: ClassVar[bool] = False
    interval: ClassVar[tuple[float, float]] = (-math.inf, math.inf)
    is_row: ClassVar[bool] = False
    is_regressed: ClassVar[bool] = False
    is_average: ClassVar[bool] = False
    needs_data: ClassVar[bool] = False
    is_log_linear: ClassVar[bool] = False
    has_complement: ClassVar[bool] = False
    has_rate: ClassVar[bool] = False

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

    def inside(self, like: Tensor, which: int) -> Tensor:
        """One of two natural values inside the domain of a log-linear form.

        Args:
            like: Of the shape, the dtype and the device that are wanted. # (*cells, *event)
            which: 0 or 1.
        """
        return torch.full_like(like, (0.3, 0.6)[which])


class Mean(Form):
    """A number that is a location."""

    is_location = True
    is_regressed = True
    scales = True


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


class Scale(Spread):
    """A standard deviation."""

    is_whole = True
    scales = True

    def _maximiser(self, ratio: Tensor) -> Tensor:
        return ratio.clamp(min=0).sqrt()

    def _variance(self, a: Tensor) -> Tensor:
        return a**2

    def _least(self, floor: float) -> float:
        return floor**0.5

    def expected(self, n: Tensor, d: Tensor, a: Tensor) -> Tensor:
        """See `Form.expected`."""
        return (-d * a.log() - 0.5 * n / (a * a)).sum()

    def exposed(self, n: Tensor, d: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        """See `Form.exposed`."""
        return n / factor**2, d

    def outside(self, n: Tensor, d: Tensor) -> Tensor:
        """See `Form.outside`."""
        return d


class AbsoluteScale(Spread):
    """A mean absolute deviation."""


class Covariance(Spread):
    """A covariance matrix."""

    event_dim = 2
    is_whole = True
    words = "its covariance collapses: smallest eigenvalue"

    def _maximiser(self, ratio: Tensor) -> Tensor:
        return (ratio + ratio.mT) / 2

    def expected(self, n: Tensor, d: Tensor, a: Tensor) -> Tensor:
        """See `Form.expected`."""
        tril = torch.linalg.cholesky(a)
        log_det = 2 * tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        trace = (torch.cholesky_inverse(tril) * n).sum((-2, -1))
        return (-0.5 * d.squeeze(-1).squeeze(-1) * log_det - 0.5 * trace).sum()

    def floored(self, a: Tensor, floor: float) -> tuple[Tensor, Tensor]:
        """See `Form.floored`; eigenvalues are raised."""
        eigenvalues, vectors = torch.linalg.eigh(a)
        low = (eigenvalues < floor).any(-1)
        clipped = vectors @ torch.diag_embed(eigenvalues.clamp(min=floor)) @ vectors.mT
        return torch.where(low[:, None, None], clipped, a), low

    def collapsed(
        self, a: Tensor, before: Tensor, mass: Tensor, magnitude: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `Form.collapsed`.

        Units of the features do not matter: it is the correlations that are singular. As many data as
        dimensions, or fewer, span no volume.
        """
        size, eps = a.shape[-1], torch.finfo(a.dtype).eps
        variances = a.diagonal(dim1=-2, dim2=-1)
        if bool(self._is_clear(a, variances, mass, magnitude).all()):
            return torch.zeros(len(a), dtype=torch.bool, device=a.device), variances.amin(-1)
        smallest = torch.linalg.eigvalsh(a)[..., 0]
        flat = (variances.clamp(min=0).sqrt() <= 8 * eps * magnitude.to(a.dtype)).any(-1)
        unit = variances.clamp(min=torch.finfo(a.dtype).tiny).rsqrt()
        correlation = unit.unsqueeze(-1) * a * unit.unsqueeze(-2)
        singular = torch.linalg.eigvalsh(correlation)[..., 0] <= 8 * size * eps
        few = (mass < size + 1 + 1e-6) & (smallest < 1e-8 * torch.linalg.eigvalsh(before)[..., 0])
        return flat | singular | few, smallest

    def _is_clear(self, a: Tensor, variances: Tensor, mass: Tensor, magnitude: Tensor) -> Tensor:
        """Well away from a collapse, which is cheap to see: no eigenvalues are needed."""
        tril, info = torch.linalg.cholesky_ex(a)
        # The squared pivot over the variance is 1 − R² of a feature on those before it.
        pivots = tril.diagonal(dim1=-2, dim2=-1)
        clear = (info == 0) & (pivots.square() > 1e-4 * variances).all(-1)
        clear &= (variances > 1e-8 * magnitude.to(a.dtype) ** 2).all(-1)
        return clear & (mass > a.shape[-1] + 1.1)

    def filler(self, like: Tensor) -> Tensor:
        """See `Form.filler`."""
        return eye(like)

    def stays_in(self, constraint: constraints.Constraint, link: str) -> bool:
        """See `Form.stays_in`."""
        # Exact types: a unit or correlation Cholesky factor has another maximiser.
        return type(_elementary(constraint)).__name__.lstrip("_") in (
            ("LowerCholesky", "SoftplusLowerCholesky")
            if link == "Cholesky factor"
            else ("PositiveDefinite", "SoftplusPositiveDefinite", "PositiveSemidefinite")
        )


class Probability(Form):
    """A probability."""

    is_whole = True
    interval = (0.0, 1.0)
    is_log_linear = True
    has_complement = True

    def _maximiser(self, ratio: Tensor) -> Tensor:
        return ratio.clamp(0, 1)

    def expected(self, n: Tensor, d: Tensor, a: Tensor) -> Tensor:
        """See `Form.expected`."""
        return (torch.xlogy(n, a) + torch.xlogy((d - n).clamp(min=0), 1 - a)).sum()

    def outside(self, n: Tensor, d: Tensor) -> Tensor:
        """See `Form.outside`."""
        return torch.minimum(n, d - n)

    def features(self, n: Tensor, d: Tensor) -> tuple[Tensor, ...]:
        """See `Form.features`."""
        return n, d - n


class Rate(Form):
    """A rate of events."""

    is_whole = True
    scales = True
    interval = (0.0, math.inf)
    is_log_linear = True
    has_rate = True

    def massless(self, n: Tensor, d: Tensor) -> Tensor:
        """See `Form.massless`.

        An exponential rate without any waiting time has no finite maximiser; the check names it.
        """
        return super().massless(n, d) & ~(n > 0)

    def expected(self, n: Tensor, d: Tensor, a: Tensor) -> Tensor:
        """See `Form.expected`.

        Example:
            >>> n, d = torch.tensor(6.0), torch.tensor(2.0)
            >>> Rate().expected(n, d, torch.tensor(3.0)) > Rate().expected(n, d, torch.tensor(2.9))
            tensor(True)
        """
        return (torch.xlogy(n, a) - d * a).sum()

    def exposed(self, n: Tensor, d: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        """See `Form.exposed`."""
        return n, d * factor

    def outside(self, n: Tensor, d: Tensor) -> Tensor:
        """See `Form.outside`."""
        return n

    def features(self, n: Tensor, d: Tensor) -> tuple[Tensor, ...]:
        """See `Form.features`."""
        return n, d


class Simplex(Form):
    """A row of probabilities."""

    event_dim = 1
    is_whole = True
    interval = (0.0, 1.0)
    is_row = True
    is_log_linear = True

    def solve(self, n: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        """See `Form.solve`."""
        total = n.sum(-1, keepdim=True)
        return n / torch.where(total > 0, total, 1.0), (total <= 0).reshape(-1)

    def expected(self, n: Tensor, d: Tensor, a: Tensor) -> Tensor:
        """See `Form.expected`."""
        return torch.xlogy(n, a).sum()

    def outside(self, n: Tensor, d: Tensor) -> Tensor:
        """See `Form.outside`."""
        return n

    def stays_in(self, constraint: constraints.Constraint, link: str) -> bool:
        """See `Form.stays_in`."""
        interval, (low, high) = bounds(constraint), self.interval
        inside = interval is not None and interval[0] <= low and interval[1] >= high
        return _elementary(constraint) is constraints.simplex or (inside and link == "identity")

    def features(self, n: Tensor, d: Tensor) -> tuple[Tensor, ...]:
        """See `Form.features`."""
        return (n,)

    def inside(self, like: Tensor, which: int) -> Tensor:
        """See `Form.inside`."""
        ramp = torch.arange(1.0, like.shape[-1] + 1).to(like) ** which
        return (ramp / ramp.sum()).expand(like.shape)


class MeanVector(Form):
    """A vector that is a location."""

    event_dim = 1
    is_location = True
    is_average = True

    def solve(self, n: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        """See `Form.solve`; the denominator is a matrix."""
        massless = ~(d.diagonal(dim1=-2, dim2=-1) > 0).all(-1)
        safe = torch.where(massless[:, None, None], eye(d), d)
        return torch.linalg.solve(safe, n.unsqueeze(-1)).squeeze(-1), massless


class Median(Form):
    """A location under absolute deviations, which no sums give."""

    is_location = True
    needs_data = True

    def of_data(self, x: Tensor, w: Tensor) -> Tensor:
        """See `Form.of_data`; a weighted median.

        Example:
            >>> Median().of_data(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([5.0, 1.0, 1.0]))
            tensor(3.)
        """
        order = x.argsort()
        total = w[order].cumsum(0)
        middle = int(torch.searchsorted(total, total[-1] / 2))
        return x[order][min(middle, len(x) - 1)]


class Kind(Enum):
    """The functional form of the expected log joint in one argument (see the module's table).

    Attributes:
        form: What the form is and does.
        event_dim: See `Form`; fields here too, since they are asked for at every site of a model.
        is_location: See `Form`.
        is_spread: See `Form`.
        is_whole: See `Form`.
    """

    MEAN = "mean", Mean()
    SCALE = "scale", Scale()
    ABSOLUTE_SCALE = "absolute scale", AbsoluteScale()
    PROBABILITY = "probability", Probability()
    RATE = "rate", Rate()
    SIMPLEX = "simplex", Simplex()
    MEAN_VECTOR = "mean vector", MeanVector()
    COVARIANCE = "covariance", Covariance()
    MEDIAN = "median", Median()

    form: Form
    event_dim: int
    is_location: bool
    is_spread: bool
    is_whole: bool

    def __new__(cls, words: str, form: Form) -> Kind:
        """A member whose value is its name in words, as messages and saved files have it."""
        member = object.__new__(cls)
        member._value_ = words
        member.form = form
        member.event_dim = form.event_dim
        member.is_location = form.is_location
        member.is_spread = form.is_spread
        member.is_whole = form.is_whole
        return member


def eye(like: Tensor) -> Tensor:
    """Identity matrices. # like ``like``"""
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device).expand(like.shape)


def _elementary(constraint: Any) -> Any:
    """A constraint without the dimensions that ``constraints.independent`` takes into its events."""
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return constraint
