"""Log densities in predictors of several arguments: regressions with a dispersion.

    Gamma               α = exp u,  β = exp ζ        α (ζ + log x) − x exp ζ − log Γ(α)
    negative binomial   r = exp u,  logits ζ         log Γ(x + r) − log Γ(r) + x log σ(ζ) + r log σ(−ζ)
    Gamma-Poisson       r = exp u,  rate exp(−ζ)     the same

each up to a term of the data alone. A predictor is affine in coefficients and in logarithms of positive
parameters, so that α exp(−x·w), a Gamma rate whose mean is exp(x·w), has ζ = u − x·w. Newton's method
finds coefficients and dispersion together.

Source: McCullagh and Nelder (1989), chapter 8; Hilbe (2011), "Negative Binomial Regression", section 8.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

_LARGE = 1e3  # a shape from which on series replace differences that would cancel


@dataclass(frozen=True, eq=False)
class Bend:
    """A log density at predictors, with its derivatives in them.

    Attributes:
        value: In nats, up to a term of the data alone. # (*cells)
        slope: By argument. # (*cells) each
        curvature: Minus the second derivatives, by pairs of arguments in their order. # (*cells) each
    """

    value: Tensor
    slope: Mapping[str, Tensor]
    curvature: Mapping[tuple[str, str], Tensor]


Data = tuple[Tensor, ...]


@dataclass(frozen=True)
class PredictedForm:
    """A log density as a function of one predictor for each of its arguments.

    Attributes:
        data: What it reads of values.
        links: What makes each argument of its predictor, by its name in
            `pyro_em.graph.bindings.binding.LINKS`.
        at: From these and predictors to the density with its derivatives.
        shape: The argument that is a dispersion; empty for none.
        limit: What the density becomes as that runs off, for a message.
        spread: A spread, and the location that it is about, where the density has no bound as the
            spread goes to zero on equal data.
        largest: The shape beyond which data have no noise but rounding, and the density no bound.
        of_features: What it reads of expected features of the family's linear form, where that is all
            it needs: of latents that are integrated. # (*cells, P) to the same as ``data``
    """

    data: Callable[[Tensor], Data]
    links: Mapping[str, str]
    at: Callable[[Data, Mapping[str, Tensor]], Bend]
    shape: str = ""
    limit: str = ""
    spread: tuple[str, str] | None = None
    largest: float = math.inf
    of_features: Callable[[Tensor], Data] | None = None


def digamma_rise(r: Tensor, x: Tensor) -> Tensor:
    """ψ(r + x) − ψ(r), by the asymptotic series where the difference would cancel.

    Example:
        >>> r = torch.tensor([2.0, 1e9], dtype=torch.float64)
        >>> digamma_rise(r, torch.tensor(2.0, dtype=torch.float64)) * r
        tensor([1.6667, 2.0000], dtype=torch.float64)
    """
    top = r + x
    far = (x / r).log1p() + 0.5 * x / (r * top) - (top**-2 - r**-2) / 12
    return torch.where(r > _LARGE, far, top.digamma() - r.digamma())


def trigamma_rise(r: Tensor, x: Tensor) -> Tensor:
    """ψ′(r + x) − ψ′(r), by the asymptotic series where the difference would cancel."""
    top = r + x
    far = -x / (r * top) + 0.5 * (top**-2 - r**-2) + (top**-3 - r**-3) / 6
    near = torch.special.polygamma(1, top) - torch.special.polygamma(1, r)
    return torch.where(r > _LARGE, far, near)


def log_rising(r: Tensor, x: Tensor) -> Tensor:
    """log Γ(r + x) − log Γ(r), by Stirling's series where the difference would cancel."""
    inverse = (r + x).reciprocal()
    rest = (inverse - inverse**3 / 30 - r.reciprocal() + r**-3 / 30) / 12
    far = x * (r + x).log() + (r - 0.5) * (x / r).log1p() - x + rest
    return torch.where(r > _LARGE, far, (r + x).lgamma() - r.lgamma())


def _with_logarithms(x: Tensor) -> Data:
    return x, x.clamp(min=torch.finfo(x.dtype).tiny).log()


def gamma(data: Data, at: Mapping[str, Tensor]) -> Bend:
    """Of a Gamma; the predictors are log α and log β."""
    zeta, shape = at["rate"], at["concentration"].exp()
    x, log_x = data
    mean, level = x * zeta.exp(), zeta + log_x
    lead = shape * (level - shape.digamma())
    return Bend(
        shape * level - mean - shape.lgamma(),
        {"concentration": lead, "rate": shape - mean},
        {
            ("concentration", "concentration"): shape**2 * torch.special.polygamma(1, shape) - lead,
            ("concentration", "rate"): -shape,
            ("rate", "rate"): mean,
        },
    )


def _counts(x: Tensor, u: Tensor, zeta: Tensor) -> tuple[Tensor, ...]:
    """Of a negative binomial with r = exp u and logits ζ: the value, both slopes, three curvatures."""
    r, p = u.exp(), zeta.sigmoid()
    log_q = logsigmoid(-zeta)
    lead = r * (digamma_rise(r, x) + log_q)
    both = (x + r) * p
    return (
        log_rising(r, x) + x * logsigmoid(zeta) + r * log_q,
        lead,
        x - both,
        -lead - r * r * trigamma_rise(r, x),
        r * p,
        both * (-zeta).sigmoid(),
    )


def _negative_binomial(data: Data, at: Mapping[str, Tensor]) -> Bend:
    (x,), shape = data, "total_count"
    name = next(n for n in at if n != shape)
    value, lead, slope, curved, mixed, own = _counts(x, at[shape], at[name])
    curvature = {(shape, shape): curved, (shape, name): mixed, (name, name): own}
    return Bend(value, {shape: lead, name: slope}, curvature)


def _gamma_poisson(data: Data, at: Mapping[str, Tensor]) -> Bend:
    (x,), shape, rate = data, "concentration", "rate"
    value, lead, slope, curved, mixed, own = _counts(x, at[shape], -at[rate])
    curvature = {(shape, shape): curved, (shape, rate): -mixed, (rate, rate): own}
    return Bend(value, {shape: lead, rate: -slope}, curvature)


GAMMA = PredictedForm(
    _with_logarithms,
    {"concentration": "exp", "rate": "exp"},
    gamma,
    "concentration",
    "data without noise",
    largest=1e13,
    of_features=lambda feature: (feature[..., 1], feature[..., 0]),
)

NEGATIVE_BINOMIAL = PredictedForm(
    lambda x: (x,),
    {"total_count": "exp", "logits": "", "probs": "sigmoid"},
    _negative_binomial,
    "total_count",
    "Poisson counts",
)

GAMMA_POISSON = PredictedForm(
    lambda x: (x,),
    {"concentration": "exp", "rate": "exp"},
    _gamma_poisson,
    "concentration",
    "Poisson counts",
)
