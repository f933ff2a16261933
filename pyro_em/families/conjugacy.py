"""Priors whose product with an expected likelihood keeps its form, and what each adds to it.

With a prior p(a) on an argument a, the M-step maximises E_q[log p(x, z | a)] + log p(a). Where
log p(a) has the functional form of the argument's `Kind`, the maximiser stays in closed form: the
prior's numerator and denominator are added to the expected ones.

| prior | kind | numerator | denominator |
|---|---|---|---|
| Dirichlet(α) | simplex | α − 1 | Σ (α − 1) |
| Beta(a, b) | probability | a − 1 | a + b − 2 |
| Gamma(a, b), Exponential(b) | rate | a − 1, 0 | b |
| Normal(m, s), MultivariateNormal(m, S) | mean, mean vector | m / s², S⁻¹ m | s⁻², S⁻¹ |
| InverseGamma(a, b) on a variance | scale, through the square root | 2 b | 2 (a + 1) |
| Gamma(a, b) on a precision | scale, through 1/√ | 2 b | 2 (a − 1) |
| Wishart(ν, V) on a precision matrix | covariance, through its inverse | V⁻¹ | ν − D − 1 |
| InverseGamma(a, b) | absolute scale | b | a + 1 |
| Uniform | any of one number | 0 | 0, clipped to its interval |

A numerator below zero (Dirichlet(0.5) on a component without data) has no maximiser: the density is
unbounded at the boundary.

A Normal prior on a mean whose scale is that of the data times a known factor (a Normal–inverse-gamma
or a Normal–Wishart) adds to both: to the mean as above at the present spread, and to the spread as one
more datum does (`pyro_em.updates.closed_forms.priors`).

Source: Gelman et al., "Bayesian Data Analysis" (3rd ed. 2013), sections 2.4, 2.6 and 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_em.families.family import PRECISION, Arguments
from pyro_em.families.forms import Kind

Contribution = Callable[[Arguments], tuple[Tensor, Tensor]]


def _dirichlet(a: Arguments) -> tuple[Tensor, Tensor]:
    n = a["concentration"] - 1
    return n, n.sum(-1, keepdim=True)


def _beta(a: Arguments) -> tuple[Tensor, Tensor]:
    n = a["concentration1"] - 1
    return n, n + a["concentration0"] - 1


def _gamma_rate(a: Arguments) -> tuple[Tensor, Tensor]:
    return a["concentration"] - 1, a["rate"]


def _exponential_rate(a: Arguments) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(a["rate"]), a["rate"]


def _normal_mean(a: Arguments) -> tuple[Tensor, Tensor]:
    precision = a["scale"] ** -2
    return a["loc"] * precision, precision


def _normal_mean_vector(a: Arguments) -> tuple[Tensor, Tensor]:
    n, d = _normal_mean(a)
    return n, torch.diag_embed(d.expand(n.shape))


def inverse_matrix(a: Arguments) -> Tensor:
    """The inverse of a matrix argument, in whichever form it was given. # (..., D, D)"""
    if "precision_matrix" in a:
        return a["precision_matrix"]
    factor = a.get("scale_tril")
    if factor is None:
        factor = torch.linalg.cholesky(a["covariance_matrix"])
    return torch.cholesky_inverse(factor)


def _mvn_mean_vector(a: Arguments) -> tuple[Tensor, Tensor]:
    precision = inverse_matrix(a)
    return (precision @ a["loc"].unsqueeze(-1)).squeeze(-1), precision


def _inverse_gamma_variance(a: Arguments) -> tuple[Tensor, Tensor]:
    return 2 * a["rate"], 2 * (a["concentration"] + 1)


def _gamma_precision(a: Arguments) -> tuple[Tensor, Tensor]:
    return 2 * a["rate"], 2 * (a["concentration"] - 1)


def _wishart_precision(a: Arguments) -> tuple[Tensor, Tensor]:
    n = inverse_matrix(a)
    # A number for a matrix comes expanded to its elements.
    return n, a["df"][..., :1, :1] - n.shape[-1] - 1


def _inverse_gamma_scale(a: Arguments) -> tuple[Tensor, Tensor]:
    return a["rate"], a["concentration"] + 1


def _flat(a: Arguments) -> tuple[Tensor, Tensor]:
    zero = torch.zeros_like(a["low"] + a["high"])
    return zero, zero


_BY_ROOT = (("sqrt",), ("power 0.5",))

_BY_INVERSE_ROOT = (("rsqrt",), ("power -0.5",), ("sqrt", "reciprocal"), ("reciprocal", "sqrt"))

_RULES: Mapping[tuple[type, Kind, tuple[str, ...]], Contribution] = {
    (dist.Dirichlet, Kind.SIMPLEX, ()): _dirichlet,
    (dist.Beta, Kind.PROBABILITY, ()): _beta,
    (dist.Gamma, Kind.RATE, ()): _gamma_rate,
    (dist.Exponential, Kind.RATE, ()): _exponential_rate,
    (dist.Normal, Kind.MEAN, ()): _normal_mean,
    (dist.Normal, Kind.MEAN_VECTOR, ()): _normal_mean_vector,
    (dist.MultivariateNormal, Kind.MEAN_VECTOR, ()): _mvn_mean_vector,
    (dist.InverseGamma, Kind.ABSOLUTE_SCALE, ()): _inverse_gamma_scale,
    **{(dist.InverseGamma, Kind.SCALE, m): _inverse_gamma_variance for m in _BY_ROOT},
    **{(dist.Gamma, Kind.SCALE, m): _gamma_precision for m in _BY_INVERSE_ROOT},
    **{
        (dist.Uniform, kind, ()): _flat
        for kind in Kind
        if kind.event_dim == 0 and not kind.form.needs_data
    },
}


# Priors on an argument that is the inverse of the natural value.
_OF_PRECISION: Mapping[tuple[type, Kind, tuple[str, ...]], Contribution] = {
    (dist.Wishart, Kind.COVARIANCE, ()): _wishart_precision,
}


def conjugate(
    distribution: type, kind: Kind, maps: tuple[str, ...], link: str = "identity"
) -> Contribution | None:
    """What a prior adds to numerator and denominator, or None where it has another form.

    Args:
        distribution: The prior's exact class.
        kind: The form of the expected log joint in the argument.
        maps: Names of the elementwise maps from the latent to the argument, innermost first.
        link: Name of the link from the natural value to the argument.

    Example:
        >>> n, d = conjugate(dist.Beta, Kind.PROBABILITY, ())(
        ...     {"concentration1": torch.tensor(3.0), "concentration0": torch.tensor(2.0)})
        >>> float(n), float(d)
        (2.0, 3.0)
    """
    if link == PRECISION.name:
        return _OF_PRECISION.get((distribution, kind, maps))
    return _RULES.get((distribution, kind, maps)) if link == "identity" else None
