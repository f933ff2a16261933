"""What the expected log density of a family is, as a function of its argument and sums over data.

Each kind of closed form is the maximiser of one functional form in the argument a, given the
numerator n and the denominator d of its rule:

    rate          n log a − d a
    probability   n log a + (d − n) log(1 − a)
    simplex       Σ_k n_k log a_k
    scale         −d log a − n / (2 a²)
    covariance    −½ d log det a − ½ tr(a⁻¹ n)

A location has no form of its own: n of the family's scale or covariance is taken about it. Terms free
of the argument are left out, so that only differences between two values of it mean something.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor


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

    @property
    def event_dim(self) -> int:
        """Rightmost dimensions of one solution: a number, a vector or a matrix."""
        return {Kind.SIMPLEX: 1, Kind.MEAN_VECTOR: 1, Kind.COVARIANCE: 2}.get(self, 0)

    @property
    def is_location(self) -> bool:
        """Whether the argument is updated before the family's scale."""
        return self in (Kind.MEAN, Kind.MEAN_VECTOR, Kind.MEDIAN)

    @property
    def is_spread(self) -> bool:
        """Whether zero is a collapse rather than a value."""
        return self in (Kind.SCALE, Kind.ABSOLUTE_SCALE, Kind.COVARIANCE)


_FORMS = (Kind.RATE, Kind.PROBABILITY, Kind.SIMPLEX, Kind.SCALE, Kind.COVARIANCE)


def expected(kind: Kind, n: Tensor, d: Tensor, a: Tensor) -> Tensor:
    """The expected log density up to a term free of the argument, summed over all cells, in nats.

    Args:
        kind: The functional form.
        n: Numerators. # (*cells, *event)
        d: Denominators. # (*cells, *event or 1s)
        a: Natural values. # (*cells or 1s, *event)

    Example:
        >>> n, d = torch.tensor(6.0), torch.tensor(2.0)
        >>> more = expected(Kind.RATE, n, d, torch.tensor(3.0))
        >>> bool(more > expected(Kind.RATE, n, d, torch.tensor(2.9)))
        True
    """
    if kind is Kind.RATE:
        return (torch.xlogy(n, a) - d * a).sum()
    if kind is Kind.PROBABILITY:
        return (torch.xlogy(n, a) + torch.xlogy((d - n).clamp(min=0), 1 - a)).sum()
    if kind is Kind.SIMPLEX:
        return torch.xlogy(n, a).sum()
    if kind is Kind.SCALE:
        return (-d * a.log() - 0.5 * n / (a * a)).sum()
    assert kind is Kind.COVARIANCE
    tril = torch.linalg.cholesky(a)
    log_det = 2 * tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    trace = (torch.cholesky_inverse(tril) * n).sum((-2, -1))
    return (-0.5 * d.squeeze(-1).squeeze(-1) * log_det - 0.5 * trace).sum()


def _floored(kind: Kind, natural: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """Spreads raised to a floor on the variance, and which of them were below it."""
    if kind is Kind.COVARIANCE:
        eigenvalues, vectors = torch.linalg.eigh(natural)
        low = (eigenvalues < floor).any(-1)
        clipped = vectors @ torch.diag_embed(eigenvalues.clamp(min=floor)) @ vectors.mT
        return torch.where(low[:, None, None], clipped, natural), low
    least = floor**0.5 if kind is Kind.SCALE else floor
    return natural.clamp(min=least), natural < least


def _eye(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device).expand(like.shape)


def solve_kind(kind: Kind, n: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """The natural values, and which events had no mass."""
    if kind is Kind.SIMPLEX:
        total = n.sum(-1, keepdim=True)
        massless = (total <= 0).reshape(-1)
        return n / torch.where(total > 0, total, 1.0), massless
    if kind is Kind.MEAN_VECTOR:
        massless = ~(d.diagonal(dim1=-2, dim2=-1) > 0).all(-1)
        safe = torch.where(massless[:, None, None], _eye(d), d)
        return torch.linalg.solve(safe, n.unsqueeze(-1)).squeeze(-1), massless
    massless = ~(d.reshape(d.shape[0], -1).amax(-1) > 0)
    if kind is Kind.RATE:
        # An exponential rate without any waiting time has no finite maximiser; leave it to the check.
        massless = massless & ~(n > 0)
    shape = (-1,) + (1,) * (d.dim() - 1)
    ratio = n / torch.where(massless.reshape(shape), 1.0, d)
    if kind is Kind.SCALE:
        return ratio.clamp(min=0).sqrt(), massless
    if kind is Kind.COVARIANCE:
        return (ratio + ratio.mT) / 2, massless
    if kind is Kind.PROBABILITY:
        return ratio.clamp(0, 1), massless
    return ratio, massless
