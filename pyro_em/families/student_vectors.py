"""MultivariateStudentT as a multivariate Normal whose precision is drawn for each datum.

    u ~ Gamma(ν/2, ν/2),    x | u ~ Normal(μ, L Lᵀ / u)

The E-step takes u in, as `pyro_em.families.student` does of single numbers. With δ² = ‖L⁻¹ (x − μ)‖² of
D numbers,

    E[u] = (ν + D) / (ν + δ²),    E[log u] = log E[u] + ψ((ν + D)/2) − log((ν + D)/2),

and given Σ E[u], Σ E[u] d, Σ E[u] d dᵀ and Σ (E[log u] − E[u] + 1), d = x − μ at the E-step, the mean
vector is the weighted mean, L Lᵀ is the scatter over the number of data, and ν has an equation of its
own. All of them together are the maximiser, which raises the evidence as any M-step does.

Source: Lange, Little and Taylor (1989), "Robust statistical modeling using the t distribution", Journal
of the American Statistical Association 84; Peel and McLachlan (2000), "Robust mixture modelling using
the t distribution", Statistics and Computing 10.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_em.families.family import (
    CHOLESKY,
    Arguments,
    Family,
    NaturalForm,
    Rule,
    Statistics,
    weigh,
)
from pyro_em.families.forms import Kind
from pyro_em.families.maxima import shape_of
from pyro_em.families.normal import SPREADS, scatter
from pyro_em.families.predicted import log_rising


@dataclass(frozen=True)
class VectorScaleMixture(NaturalForm):
    """What sums say of Student vectors whose precisions are latents.

    ``feature`` holds Σ (E[log u] − E[u] + 1), which is all that the degrees of freedom ask for; the
    other sums are those of a multivariate Normal whose data weigh E[u].
    """

    def terms(self, statistics: Statistics, arguments: Arguments) -> Tensor:
        """See `NaturalForm.terms`."""
        w = statistics["weight"]
        parts = []
        if "df" in arguments:
            half = arguments["df"] / 2
            of_df = w * (half * half.log() - half.lgamma() - half)
            parts += [of_df, half * statistics["feature"][..., 0]]
        if "square" in statistics:
            tril = arguments["scale_tril"].to(w.dtype)
            white = torch.linalg.solve_triangular(
                tril, _scatter(statistics, arguments), upper=False
            )
            white = torch.linalg.solve_triangular(tril, white.mT, upper=False)
            log_det = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
            parts += [-w * log_det, -0.5 * white.diagonal(dim1=-2, dim2=-1).sum(-1)]
        found = torch.stack(torch.broadcast_tensors(*parts), -1)
        return torch.where(w.unsqueeze(-1) == 0, 0.0, found)


def expected_logarithm(df: Tensor, D: int) -> Tensor:
    """E[log u] − log E[u] of a precision's posterior."""
    half = (df + D) / 2
    return half.digamma() - half.log()


def log_normaliser(df: Tensor, log_det: Tensor, D: int) -> Tensor:
    """The logarithm of the density's largest value.

    Args:
        df: ν.
        log_det: log det L.
        D: How many numbers a vector has.
    """
    half = df / 2
    return log_rising(half, torch.full_like(half, D / 2)) - 0.5 * D * (df * math.pi).log() - log_det


def _squared_distance(x: Tensor, a: Arguments) -> tuple[Tensor, Tensor]:
    """d = x − μ and ‖L⁻¹ d‖². # (*batch, D), (*batch)"""
    d, tril = x - a["loc"], a["scale_tril"]
    eye = torch.eye(tril.shape[-1], dtype=tril.dtype, device=tril.device)
    # The small triangle is inverted once, and rows with one matrix are one product.
    white = (torch.linalg.solve_triangular(tril, eye, upper=False) @ d.unsqueeze(-1)).squeeze(-1)
    return d, white.square().sum(-1)


def _log_density(x: Tensor, a: Arguments) -> Tensor:
    df, D = a["df"], x.shape[-1]
    log_det = a["scale_tril"].diagonal(dim1=-2, dim2=-1).log().sum(-1)
    distance = _squared_distance(x, a)[1]
    return log_normaliser(df, log_det, D) - 0.5 * (df + D) * (distance / df).log1p()


def _precisions(x: Tensor, a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """d, E[u] and E[log u] − E[u] + 1."""
    df, D = a["df"], x.shape[-1]
    d, distance = _squared_distance(x, a)
    mean = (df + D) / (df + distance)
    return d, mean, mean.log() + expected_logarithm(df, D) - mean + 1


def _statistics(x: Tensor, a: Arguments) -> Statistics:
    d, mean, rest = _precisions(x, a)
    return {
        "precision": mean,
        "deviation": mean.unsqueeze(-1) * d,
        "square": mean[..., None, None] * d.unsqueeze(-1) * d.unsqueeze(-2),
        "feature": rest.unsqueeze(-1),
    }


def _accumulate(weights: Tensor, value: Tensor, a: Arguments, keep: tuple[bool, ...]) -> Statistics:
    """Sums of T(x), without a matrix of every datum."""
    d, mean, rest = _precisions(value, a)
    batch = torch.broadcast_shapes(weights.shape, mean.shape)
    weighed = weights.expand(batch) * mean
    return {
        "precision": weigh(weighed, torch.ones_like(mean[(slice(0, 1),) * mean.dim()]), keep),
        "feature": weigh(weights, rest.unsqueeze(-1), keep),
        **scatter(weighed, d.to(weighed.dtype), keep),
    }


def _scatter(s: Statistics, a: Arguments) -> Tensor:
    """Σ E[u] (x − μ) (x − μ)ᵀ. # (*cells, D, D)"""
    as_normal = {**s, "weight": s["precision"]}
    loc = a["loc"].to(s["square"].dtype)
    return SPREADS["scale_tril"].contribution(as_normal, {"loc": loc})[0]


def _mean_vector(s: Statistics, a: Arguments) -> tuple[Tensor, Tensor]:
    weight = s["precision"].unsqueeze(-1)
    precision = torch.cholesky_inverse(a["scale_tril"]).to(weight.dtype)
    total = s["deviation"] + weight * s["reference:loc"]
    return (precision @ total.unsqueeze(-1)).squeeze(-1), precision * weight.unsqueeze(-1)


def _spread(s: Statistics, a: Arguments) -> tuple[Tensor, Tensor]:
    return _scatter(s, a), s["weight"][..., None, None]


def _derivatives(s: Statistics, a: Arguments) -> tuple[Tensor, Tensor]:
    half, w = a["df"] / 2, s["weight"]
    slope = 0.5 * (w * (half.log() - half.digamma()) + s["feature"][..., 0])
    curved = 0.25 * w * (1 / half - torch.special.polygamma(1, half))
    return slope.unsqueeze(-1), curved.unsqueeze(-1).unsqueeze(-1)


def _degrees(s: Statistics, a: Arguments) -> Tensor | None:
    """The maximising degrees of freedom. # (*cells, 1)"""
    half = shape_of(-s["feature"][..., 0] / s["weight"])
    return None if half is None else (2 * half).unsqueeze(-1)


FAMILIES = (
    Family(
        dist.MultivariateStudentT,
        _statistics,
        {
            "loc": Rule(Kind.MEAN_VECTOR, _mean_vector),
            "scale_tril": Rule(Kind.COVARIANCE, _spread, CHOLESKY),
        },
        log_density=_log_density,
        accumulate=_accumulate,
        event_dim=1,
        natural=VectorScaleMixture(
            ("df",), derivatives=_derivatives, is_augmented=True, maximum=_degrees
        ),
    ),
)
