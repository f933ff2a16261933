"""Priors whose posterior has their own form: the kernels that a conjugate latent may have.

A kernel has statistics t and hyperparameters χ,

    log p(λ | χ) = χ·t(λ) − A(χ) + h·t(λ).

| prior | t | A(χ) |
|---|---|---|
| Gamma(a, b), Exponential(b), InverseGamma(a, b) on g = 1/λ | log g, −g | log Γ(a) − a log b |
| Beta(a, b) | log p, log(1 − p) | log B(a, b) |
| Dirichlet(α) | log p | log B(α) |
| Wishart(ν, V) | ½ log det Λ, −½ Λ | ½ ν D log 2 + log Γ_D(ν/2) + ½ ν log det V |

Source: Gelman et al., "Bayesian Data Analysis" (3rd ed. 2013), appendix A.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_em.families.family import Arguments, Statistics
from pyro_em.families.forms import eye
from pyro_em.families.normal import precision_matrix

_MANY = 1024  # numbers from which on it is looked whether all are the same


@dataclass(frozen=True)
class PriorKernel:
    """The form that a prior and its posterior share.

    Attributes:
        distribution: The prior's exact class.
        kind: Which column of `conjugate_pairs.PAIRS` serves it.
        support: ``"positive"``, ``"unit"``, ``"simplex"`` or ``"matrix"`` (positive definite).
        power: What a power of the latent is a power of g to: 1, or −1 where g = 1/λ.
        chi: χ of a prior's arguments. # (*batch, P)
        normaliser: A(χ) in nats. # (*batch,)
        expected: E[t] at χ. # (*batch, P)
        base: h·t, the part of the log density free of χ. # (*batch,)
        arguments: The distribution's class and its arguments at χ.
        statistics: The family's statistics of the latent, in terms of E[t].
    """

    distribution: type
    kind: str
    support: str
    power: float
    chi: Callable[[Arguments], Tensor]
    normaliser: Callable[[Tensor], Tensor]
    expected: Callable[[Tensor], Tensor]
    base: Callable[[Tensor], Tensor]
    arguments: Callable[[Tensor], tuple[type, dict[str, Tensor]]]
    statistics: Callable[[Tensor], Statistics]

    @property
    def event_dim(self) -> int:
        """Dimensions of one latent's value."""
        return {"simplex": 1, "matrix": 2}.get(self.support, 0)

    def unit(self, like: Tensor) -> Tensor:
        """The value at which an argument of a child is its known factor."""
        if self.support == "positive":
            return torch.ones_like(like)
        if self.support == "matrix":
            # No diagonal matrix: multiples of one by a parameter are read as independent Normals.
            return (eye(like) + 1) / 2
        share = 1 / like.shape[-1] if self.support == "simplex" else 0.5
        return torch.full_like(like, share)

    def units(self, shape: torch.Size, like: Tensor) -> Tensor:
        """The unit of many latents, in the memory of one. # (*batch, *event)"""
        batch = len(shape) - self.event_dim
        return self.unit(like.new_empty((*(1,) * batch, *shape[batch:]))).expand(shape)

    def inside(self, real: Tensor) -> Tensor:
        """Values in the support, from any numbers."""
        if self.support == "positive":
            return (0.5 * real).exp()
        if self.support == "matrix":
            return real @ real.mT / real.shape[-1] + eye(real)
        return real.softmax(-1) if self.support == "simplex" else real.sigmoid()

    def statistics_at(self, value: Tensor) -> Tensor:
        """t(λ). # (*batch, P)"""
        if self.support == "positive":
            g = value**self.power
            return torch.stack([g.log(), -g], -1)
        if self.support == "matrix":
            return together_with(value.logdet() / 2, -value / 2)
        return value.log() if self.support == "simplex" else together(value.log(), (-value).log1p())

    def at_mean(self, t: Tensor) -> Tensor:
        """t at the mean of what a precision is a multiple of, where E[t] is known. # (*batch, P)"""
        if self.support == "matrix":
            mean = -2 * matrix_of(t)
            return together_with(mean.logdet() / 2, -mean / 2)
        return torch.stack([(-t[..., 1]).log(), t[..., 1]], -1)

    def tails(self, chi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What Normals become whose precisions are multiples of the latent.

        With S the covariance at the latent's mean they are Student distributions of ν degrees of
        freedom and scale matrix c S, and of covariance k S.

        Args:
            chi: Of a positive number or a matrix. # (*batch, P)

        Returns:
            ν, c and k, which is infinite up to ν = 2. # (*batch,) each
        """
        if self.support == "matrix":
            df, size = chi[..., 0], math.isqrt(chi.shape[-1])
            degrees = df - size + 1
            factor = df / degrees
        else:
            degrees = 2 * chi[..., 0]
            factor = torch.ones_like(degrees)
        spread = torch.where(degrees > 2, factor * degrees / (degrees - 2), math.inf)
        return degrees, factor, spread

    def log_density(self, t: Tensor, arguments: Arguments) -> Tensor:
        """E[log p(λ | χ)] where E[t] is known, in nats. # (*batch,)"""
        chi = self.chi(arguments)
        return (chi * t).sum(-1) - self.normaliser(chi) + self.base(t)

    def of(self, chi: Tensor) -> dist.Distribution:
        """The distribution at χ, with its own argument names."""
        distribution, arguments = self.arguments(chi)
        return distribution(**arguments)


def together(*parts: Tensor) -> Tensor:
    """Numbers of one cell behind each other. # (*batch, parts)"""
    return _behind(*torch.broadcast_tensors(*parts))


def _behind(*parts: Tensor) -> Tensor:
    """Numbers of one shape behind each other, in memory apart: each is read as it lies."""
    return torch.stack(parts).movedim(0, -1)


def together_with(number: Tensor, matrix: Tensor) -> Tensor:
    """A number and the elements of a matrix behind each other. # (*batch, 1 + D²)"""
    batch = torch.broadcast_shapes(number.shape, matrix.shape[:-2])
    elements = matrix.flatten(-2).expand(*batch, matrix.shape[-1] ** 2)
    return torch.cat([number.expand(batch).unsqueeze(-1), elements], -1)


def matrix_of(together: Tensor) -> Tensor:
    """The matrix that stands behind a number. # (*batch, D, D)"""
    size = math.isqrt(together.shape[-1])
    return together[..., 1:].unflatten(-1, (size, size))


def _gamma_chi(a: Arguments) -> Tensor:
    return together(a["concentration"], a["rate"])


def _exponential_chi(a: Arguments) -> Tensor:
    return together(torch.ones_like(a["rate"]), a["rate"])


@dataclass(frozen=True, eq=False)
class Few:
    """Numbers of which many are equal, so that a costly function is taken of each once.

    Attributes:
        first: Where each different one stands first. # (few,)
        place: Which of these each number is. # (n,)
    """

    first: Tensor
    place: Tensor

    @classmethod
    def of(cls, place: Tensor) -> Few:
        """That of the number of each one among the different ones."""
        first = place.new_zeros(int(place.max()) + 1)
        first[place] = torch.arange(len(place), device=place.device)
        return cls(first, place)


def _of_shapes(function: Callable[[Tensor], Tensor], shape: Tensor) -> Tensor:
    """A costly function of shapes, taken once where many are the same."""
    if shape.numel() > _MANY and not shape.requires_grad:
        one = shape[(0,) * shape.dim()]
        if bool((shape == one).all()):
            return function(one).expand(shape.shape)
    return function(shape)


def gamma_normaliser(chi: Tensor, lgamma: Tensor | None = None) -> Tensor:
    """A(χ) of Gammas, log Γ of whose shapes may be known. # (*batch,)"""
    shape, rate = chi.unbind(-1)
    return (_of_shapes(torch.lgamma, shape) if lgamma is None else lgamma) - shape * rate.log()


def gamma_expected(chi: Tensor, digamma: Tensor | None = None) -> Tensor:
    """E[t] of Gammas, whose shapes' ψ may be known. # (*batch, 2)"""
    shape, rate = chi.unbind(-1)
    first = _of_shapes(torch.digamma, shape) if digamma is None else digamma
    return _behind(first - rate.log(), -shape / rate)


def _less_log(t: Tensor) -> Tensor:
    return -t[..., 0]


def _log(t: Tensor) -> Tensor:
    return t[..., 0]


def _gamma_at(chi: Tensor) -> tuple[type, dict[str, Tensor]]:
    return dist.Gamma, {"concentration": chi[..., 0], "rate": chi[..., 1]}


def _inverse_gamma_at(chi: Tensor) -> tuple[type, dict[str, Tensor]]:
    return dist.InverseGamma, {"concentration": chi[..., 0], "rate": chi[..., 1]}


def _gamma_features(t: Tensor) -> Statistics:
    return {"feature": _behind(t[..., 0], -t[..., 1])}


def _inverse_gamma_features(t: Tensor) -> Statistics:
    return {"feature": -t}


def _exponential_statistics(t: Tensor) -> Statistics:
    return {"event": torch.ones_like(t[..., 0]), "exposure": -t[..., 1]}


def _beta_chi(a: Arguments) -> Tensor:
    return together(a["concentration1"], a["concentration0"])


def _dirichlet_chi(a: Arguments) -> Tensor:
    return a["concentration"]


def _simplex_normaliser(chi: Tensor) -> Tensor:
    return chi.lgamma().sum(-1) - chi.sum(-1).lgamma()


def _simplex_expected(chi: Tensor) -> Tensor:
    return chi.digamma() - chi.sum(-1, keepdim=True).digamma()


def _less_sum(t: Tensor) -> Tensor:
    return -t.sum(-1)


def _beta_at(chi: Tensor) -> tuple[type, dict[str, Tensor]]:
    return dist.Beta, {"concentration1": chi[..., 0], "concentration0": chi[..., 1]}


def _dirichlet_at(chi: Tensor) -> tuple[type, dict[str, Tensor]]:
    return dist.Dirichlet, {"concentration": chi}


def _features(t: Tensor) -> Statistics:
    return {"feature": t}


def _wishart_chi(a: Arguments) -> Tensor:
    return together_with(a["df"], precision_matrix(a))


def _wishart_normaliser(chi: Tensor) -> Tensor:
    df, inverse = chi[..., 0], matrix_of(chi)
    size = inverse.shape[-1]
    return (df / 2).mvlgamma(size) + df / 2 * (size * math.log(2) - inverse.logdet())


def _wishart_expected(chi: Tensor) -> Tensor:
    df, inverse = chi[..., 0], matrix_of(chi)
    size = inverse.shape[-1]
    halves = (df.unsqueeze(-1) - torch.arange(size, device=chi.device)) / 2
    log_det = halves.digamma().sum(-1) + size * math.log(2) - inverse.logdet()
    return together_with(log_det / 2, -df[..., None, None] * _inverse(inverse) / 2)


def _inverse(matrix: Tensor) -> Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky(matrix))


def _wishart_base(t: Tensor) -> Tensor:
    return -t[..., 0] * (math.isqrt(t.shape[-1]) + 1)


def _wishart_at(chi: Tensor) -> tuple[type, dict[str, Tensor]]:
    return dist.Wishart, {"df": chi[..., 0], "covariance_matrix": _inverse(matrix_of(chi))}


def _wishart_statistics(t: Tensor) -> Statistics:
    return {"log_det": 2 * t[..., 0], "matrix": -2 * matrix_of(t)}


_OF_GAMMA = (gamma_normaliser, gamma_expected)
_OF_SIMPLEX = (_simplex_normaliser, _simplex_expected, _less_sum)

KERNELS: Mapping[type, PriorKernel] = {
    kernel.distribution: kernel
    for kernel in (
        PriorKernel(
            dist.Gamma,
            "gamma",
            "positive",
            1.0,
            _gamma_chi,
            *_OF_GAMMA,
            _less_log,
            _gamma_at,
            _gamma_features,
        ),
        PriorKernel(
            dist.Exponential,
            "gamma",
            "positive",
            1.0,
            _exponential_chi,
            *_OF_GAMMA,
            _less_log,
            _gamma_at,
            _exponential_statistics,
        ),
        PriorKernel(
            dist.InverseGamma,
            "gamma",
            "positive",
            -1.0,
            _gamma_chi,
            *_OF_GAMMA,
            _log,
            _inverse_gamma_at,
            _inverse_gamma_features,
        ),
        PriorKernel(dist.Beta, "beta", "unit", 1.0, _beta_chi, *_OF_SIMPLEX, _beta_at, _features),
        PriorKernel(
            dist.Dirichlet,
            "dirichlet",
            "simplex",
            1.0,
            _dirichlet_chi,
            *_OF_SIMPLEX,
            _dirichlet_at,
            _features,
        ),
        PriorKernel(
            dist.Wishart,
            "wishart",
            "matrix",
            1.0,
            _wishart_chi,
            _wishart_normaliser,
            _wishart_expected,
            _wishart_base,
            _wishart_at,
            _wishart_statistics,
        ),
    )
}
