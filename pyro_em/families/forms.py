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
    lower end       0 where a ≤ x_i for all w_i > 0, else −∞, less what grows as a falls: min x_i
    upper end       0 where a > x_i for all w_i > 0, else −∞, less what grows as a rises: max x_i

To add a form, add a class with the methods of `Form` and a member to `Kind`: nothing else asks
which form it is, only what the form says of itself.
"""

from __future__ import annotations

import math
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em.distributions import bounds
from pyro_em.families.form import Curve, Form, Spread
from pyro_em.families.short_rows import log_softmax


def _times_log(n: Tensor, a: Tensor) -> Tensor:
    """n log a, zero with a slope of zero where nothing was counted: there may be zeros in a."""
    return torch.xlogy(n, torch.where(n != 0, a, 1.0))


class Mean(Form):
    """A number that is a location."""

    is_location = True
    is_regressed = True
    scales = True


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
    is_gram = True
    words = "its covariance collapses: smallest eigenvalue"

    def _maximiser(self, ratio: Tensor) -> Tensor:
        return (ratio + ratio.mT) / 2

    def expected(self, n: Tensor, d: Tensor, a: Tensor) -> Tensor:
        """See `Form.expected`."""
        tril = torch.linalg.cholesky(a)
        log_det = 2 * tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        trace = (torch.cholesky_inverse(tril) * n).sum((-2, -1))
        return (-0.5 * d.squeeze(-1).squeeze(-1) * log_det - 0.5 * trace).sum()

    def exposed(self, n: Tensor, d: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        """See `Form.exposed`; the factor is one number for a matrix, given at all its elements."""
        return n / factor, d

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
    inverse_link = "sigmoid"

    def of_predictor(self, n: Tensor, d: Tensor, eta: Tensor) -> Curve:
        """See `Form.of_predictor`: n η − d log(1 + exp η)."""
        p = torch.sigmoid(eta)
        mean = d * p
        value = n * eta - d * torch.nn.functional.softplus(eta)
        return Curve(value, n - mean, mean * torch.sigmoid(-eta))

    def _maximiser(self, ratio: Tensor) -> Tensor:
        return ratio.clamp(0, 1)

    def expected(self, n: Tensor, d: Tensor, a: Tensor) -> Tensor:
        """See `Form.expected`."""
        return (_times_log(n, a) + _times_log((d - n).clamp(min=0), 1 - a)).sum()

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
    inverse_link = "exp"

    def of_predictor(self, n: Tensor, d: Tensor, eta: Tensor) -> Curve:
        """See `Form.of_predictor`: n η − d exp η."""
        mean = d * eta.exp()
        return Curve(n * eta - mean, n - mean, mean)

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
        return (_times_log(n, a) - d * a).sum()

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
    inverse_link = "softmax"

    def of_predictor(self, n: Tensor, d: Tensor, eta: Tensor) -> Curve:
        """See `Form.of_predictor`: Σ_k n_k log softmax(η)_k."""
        log_p = log_softmax(eta)
        mean = n.sum(-1, keepdim=True) * log_p.exp()
        return Curve((n * log_p).sum(-1), n - mean, mean)

    def solve(self, n: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        """See `Form.solve`."""
        total = n.sum(-1, keepdim=True)
        return n / torch.where(total > 0, total, 1.0), (total <= 0).reshape(-1)

    def expected(self, n: Tensor, d: Tensor, a: Tensor) -> Tensor:
        """See `Form.expected`."""
        return _times_log(n, a).sum()

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
    is_regressed = True
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


class LowerEnd(Form):
    """Where the support of the data begins; from the smallest datum with weight, over all parts."""

    needs_data = True
    scales = True
    end = -1


class UpperEnd(Form):
    """Where the support of the data ends; just above the largest datum with weight."""

    needs_data = True
    scales = True
    end = 1


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
    LOWER_END = "smallest value", LowerEnd()
    UPPER_END = "largest value", UpperEnd()

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
