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

To add a form, add a class with these methods, a member to `Kind` and an entry to ``_FORMS``.
"""

from __future__ import annotations

from enum import Enum
from typing import ClassVar

import torch
from torch import Tensor


class Form:
    """One functional form; the methods are of forms with a maximiser from sums.

    Attributes:
        event_dim: Rightmost dimensions of one solution: a number, a vector or a matrix.
        is_location: Whether the argument is updated before the family's spread.
        is_spread: Whether zero is a collapse rather than a value.
        is_whole: Whether the form is all that the family's density is, free terms apart.
        scales: Whether a known positive factor on the argument keeps the form.
    """

    event_dim: ClassVar[int] = 0
    is_location: ClassVar[bool] = False
    is_spread: ClassVar[bool] = False
    is_whole: ClassVar[bool] = False
    scales: ClassVar[bool] = False

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


class Mean(Form):
    """A number that is a location."""

    is_location = True
    scales = True


class Spread(Form):
    """A form whose collapse to zero is no estimate."""

    is_spread = True
    is_whole = False
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


class Probability(Form):
    """A probability."""

    is_whole = True

    def _maximiser(self, ratio: Tensor) -> Tensor:
        return ratio.clamp(0, 1)

    def expected(self, n: Tensor, d: Tensor, a: Tensor) -> Tensor:
        """See `Form.expected`."""
        return (torch.xlogy(n, a) + torch.xlogy((d - n).clamp(min=0), 1 - a)).sum()

    def outside(self, n: Tensor, d: Tensor) -> Tensor:
        """See `Form.outside`."""
        return torch.minimum(n, d - n)


class Rate(Form):
    """A rate of events."""

    is_whole = True
    scales = True

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


class Simplex(Form):
    """A row of probabilities."""

    event_dim = 1
    is_whole = True

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


class MeanVector(Form):
    """A vector that is a location."""

    event_dim = 1
    is_location = True

    def solve(self, n: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        """See `Form.solve`; the denominator is a matrix."""
        massless = ~(d.diagonal(dim1=-2, dim2=-1) > 0).all(-1)
        safe = torch.where(massless[:, None, None], eye(d), d)
        return torch.linalg.solve(safe, n.unsqueeze(-1)).squeeze(-1), massless


class Median(Form):
    """A location under absolute deviations, which no sums give."""

    is_location = True


_FORMS: dict[str, Form] = {
    "mean": Mean(),
    "scale": Scale(),
    "absolute scale": AbsoluteScale(),
    "probability": Probability(),
    "rate": Rate(),
    "simplex": Simplex(),
    "mean vector": MeanVector(),
    "covariance": Covariance(),
    "median": Median(),
}


class Kind(Enum):
    """The functional form of the expected log joint in one argument (see the module's table)."""

    MEAN = "mean"
    SCALE = "scale"
    ABSOLUTE_SCALE = "absolute scale"
    PROBABILITY = "probability"
    RATE = "rate"
    SIMPLEX = "simplex"
    MEAN_VECTOR = "mean vector"
    COVARIANCE = "covariance"
    MEDIAN = "median"

    def __init__(self, words: str) -> None:
        self.form = _FORMS[words]
        # Fields, since they are asked for at every site of a model.
        self.event_dim = self.form.event_dim
        self.is_location = self.form.is_location
        self.is_spread = self.form.is_spread
        self.is_whole = self.form.is_whole


def eye(like: Tensor) -> Tensor:
    """Identity matrices. # like ``like``"""
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device).expand(like.shape)
