"""Gamma, InverseGamma, Beta, Dirichlet, VonMises: several arguments in one linear form.

    Gamma         log p(x | α, β) = (α − 1) log x − β x + α log β − log Γ(α)
    InverseGamma  log p(x | α, β) = −(α + 1) log x − β / x + α log β − log Γ(α)
    Beta          log p(x | a, b) = (a − 1) log x + (b − 1) log(1 − x) − log B(a, b)
    Dirichlet     log p(x | α) = Σ_i (α_i − 1) log x_i − log B(α)
    VonMises      log p(x | μ, κ) = κ cos μ cos x + κ sin μ sin x − log(2π I₀(κ))

Their statistics depend on the data alone, so that an M-step needs the sums of these and nothing else;
its maximiser has no closed form: `pyro_em.updates.sums.newton_on_sums` finds it for all arguments
together.

Source: Wainwright and Jordan (2008), section 3.
"""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_em.families import maxima, saddle_point
from pyro_em.families.family import Arguments, Family, NaturalForm, Statistics
from pyro_em.families.predicted import GAMMA

FAR = 1e30
"""In place of an infinite statistic at the edge of a support: times a weight of zero it is zero."""


def _log(x: Tensor) -> Tensor:
    return x.log().clamp(min=-FAR)


def _together(*parts: Tensor) -> Tensor:
    """Numbers of one cell behind each other. # (*batch, parts)"""
    return torch.stack(torch.broadcast_tensors(*parts), -1)


def _gamma_normaliser(shape: Tensor, rate: Tensor) -> Tensor:
    return shape * rate.log() - shape.lgamma()


def _gamma_log_density(x: Tensor, a: Arguments) -> Tensor:
    shape, rate = a["concentration"], a["rate"]
    if saddle_point.is_large(shape):
        return saddle_point.gamma(x, shape, rate)
    return dist.Gamma(shape, rate, validate_args=False).log_prob(x)


def _inverse_gamma_log_density(x: Tensor, a: Arguments) -> Tensor:
    shape, rate = a["concentration"], a["rate"]
    if saddle_point.is_large(shape):
        return saddle_point.gamma(x.reciprocal(), shape, rate) - 2 * x.log()
    return dist.InverseGamma(shape, rate, validate_args=False).log_prob(x)


def _beta_log_density(x: Tensor, a: Arguments) -> Tensor:
    alpha = _together(a["concentration1"], a["concentration0"])
    if saddle_point.is_large(alpha):
        return saddle_point.dirichlet(_together(x, 1 - x), alpha)
    one, zero = alpha.unbind(-1)
    return dist.Beta(one, zero, validate_args=False).log_prob(x)


def _dirichlet_log_density(x: Tensor, a: Arguments) -> Tensor:
    alpha = a["concentration"]
    if saddle_point.is_large(alpha):
        return saddle_point.dirichlet(x, alpha)
    return dist.Dirichlet(alpha, validate_args=False).log_prob(x)


def _gamma_statistics(x: Tensor, a: Arguments) -> Statistics:
    return {"feature": _together(_log(x), x)}


def _square(first: Tensor, mixed: Tensor, second: Tensor) -> Tensor:
    """Symmetric matrices of two rows. # (*cells, 2, 2)"""
    return torch.stack([first, mixed, mixed, second], -1).unflatten(-1, (2, 2))


def _of_shape_and_rate(s: Statistics, a: Arguments, sign: float) -> tuple[Tensor, Tensor]:
    """Derivatives of ± α Σ log x − β Σ y + w (α log β − log Γ(α))."""
    shape, rate, w = a["concentration"], a["rate"], s["weight"]
    logs, sums = s["feature"].unbind(-1)
    ratio = w / rate
    slope = torch.stack(
        [sign * logs + w * (rate.log() - shape.digamma()), shape * ratio - sums], -1
    )
    trigamma = torch.special.polygamma(1, shape)
    return slope, _square(-w * trigamma, ratio, -shape * ratio / rate)


def _gamma_derivatives(s: Statistics, a: Arguments) -> tuple[Tensor, Tensor]:
    return _of_shape_and_rate(s, a, 1.0)


def _inverse_gamma_derivatives(s: Statistics, a: Arguments) -> tuple[Tensor, Tensor]:
    return _of_shape_and_rate(s, a, -1.0)


def _gamma_coefficients(a: Arguments, P: int) -> Tensor:
    shape, rate = a["concentration"], a["rate"]
    return _together(shape - 1, -rate, _gamma_normaliser(shape, rate))


def _inverse_gamma_statistics(x: Tensor, a: Arguments) -> Statistics:
    return {"feature": _together(_log(x), x.reciprocal().clamp(max=FAR))}


def _inverse_gamma_coefficients(a: Arguments, P: int) -> Tensor:
    shape, rate = a["concentration"], a["rate"]
    return _together(-shape - 1, -rate, _gamma_normaliser(shape, rate))


def _beta_statistics(x: Tensor, a: Arguments) -> Statistics:
    return {"feature": _together(_log(x), (-x).log1p().clamp(min=-FAR))}


def _beta_coefficients(a: Arguments, P: int) -> Tensor:
    one, zero = a["concentration1"], a["concentration0"]
    normaliser = (one + zero).lgamma() - one.lgamma() - zero.lgamma()
    return _together(one - 1, zero - 1, normaliser)


def _of_concentrations(s: Statistics, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Derivatives of Σ_i α_i Σ log x_i − w log B(α). # α: (*cells, C)"""
    w, total = s["weight"].unsqueeze(-1), alpha.sum(-1, keepdim=True)
    slope = s["feature"] + w * (total.digamma() - alpha.digamma())
    own = torch.diag_embed(torch.special.polygamma(1, alpha))
    shared = torch.special.polygamma(1, total).unsqueeze(-1)
    return slope, w.unsqueeze(-1) * (shared - own)


def _beta_derivatives(s: Statistics, a: Arguments) -> tuple[Tensor, Tensor]:
    return _of_concentrations(s, _together(a["concentration1"], a["concentration0"]))


def _beta_maximum(s: Statistics, a: Arguments) -> Tensor | None:
    return maxima.dirichlet(s, _together(a["concentration1"], a["concentration0"]))


def _dirichlet_derivatives(s: Statistics, a: Arguments) -> tuple[Tensor, Tensor]:
    return _of_concentrations(s, a["concentration"])


def _dirichlet_statistics(x: Tensor, a: Arguments) -> Statistics:
    return {"feature": _log(x)}


def _dirichlet_coefficients(a: Arguments, P: int) -> Tensor:
    alpha = a["concentration"]
    normaliser = alpha.sum(-1).lgamma() - alpha.lgamma().sum(-1)
    return torch.cat([alpha - 1, normaliser.unsqueeze(-1)], -1)


def _log_bessel(kappa: Tensor) -> Tensor:
    """log I₀(κ), which does not overflow."""
    return torch.special.i0e(kappa).log() + kappa


def _von_mises_statistics(x: Tensor, a: Arguments) -> Statistics:
    return {"feature": _together(x.cos(), x.sin())}


def _von_mises_coefficients(a: Arguments, P: int) -> Tensor:
    loc, kappa = a["loc"], a["concentration"]
    normaliser = -math.log(2 * math.pi) - _log_bessel(kappa)
    return _together(kappa * loc.cos(), kappa * loc.sin(), normaliser)


def _von_mises_derivatives(s: Statistics, a: Arguments) -> tuple[Tensor, Tensor]:
    """With A(κ) = I₁(κ) / I₀(κ): A' = 1 − A² − A / κ (Mardia and Jupp 2000, appendix 1)."""
    loc, kappa, w = a["loc"], a["concentration"], s["weight"]
    cosines, sines = s["feature"].unbind(-1)
    along = cosines * loc.cos() + sines * loc.sin()
    across = sines * loc.cos() - cosines * loc.sin()
    ratio = torch.special.i1e(kappa) / torch.special.i0e(kappa)
    slope = torch.stack([kappa * across, along - w * ratio], -1)
    # Where κ is large the difference cancels, and its expansion 1 / (2 κ²) + 1 / (4 κ³) is exact.
    far = (0.5 + 0.25 / kappa) / kappa**2
    curved = torch.where(kappa > 1e4, far, 1 - ratio * ratio - ratio / kappa)
    return slope, _square(-kappa * along, across, -w * curved)


def _von_mises_log_density(value: Tensor, a: Arguments) -> Tensor:
    """The distribution's own takes a polynomial in place of I₀, which has seven digits."""
    kappa = a["concentration"]
    # κ (cos − 1) and log I₀ − κ: large concentrations do not cancel.
    nearness = -2 * ((value - a["loc"]) / 2).sin().square()
    return kappa * nearness - math.log(2 * math.pi) - torch.special.i0e(kappa).log()


_SHAPE_AND_RATE = ("concentration", "rate")

FAMILIES = (
    Family(
        dist.Gamma,
        _gamma_statistics,
        {},
        log_density=_gamma_log_density,
        natural=NaturalForm(
            _SHAPE_AND_RATE,
            _gamma_coefficients,
            _gamma_derivatives,
            maximum=maxima.gamma,
            shapes=("concentration",),
        ),
        predicted=GAMMA,
    ),
    Family(
        dist.InverseGamma,
        _inverse_gamma_statistics,
        {},
        log_density=_inverse_gamma_log_density,
        natural=NaturalForm(
            _SHAPE_AND_RATE,
            _inverse_gamma_coefficients,
            _inverse_gamma_derivatives,
            maximum=maxima.inverse_gamma,
            shapes=("concentration",),
        ),
    ),
    Family(
        dist.Beta,
        _beta_statistics,
        {},
        log_density=_beta_log_density,
        natural=NaturalForm(
            ("concentration1", "concentration0"),
            _beta_coefficients,
            _beta_derivatives,
            maximum=_beta_maximum,
            shapes=("concentration1", "concentration0"),
        ),
    ),
    Family(
        dist.Dirichlet,
        _dirichlet_statistics,
        {},
        log_density=_dirichlet_log_density,
        natural=NaturalForm(
            ("concentration",),
            _dirichlet_coefficients,
            _dirichlet_derivatives,
            maximum=lambda s, a: maxima.dirichlet(s, a["concentration"]),
            shapes=("concentration",),
        ),
        event_dim=1,
        event_dims={"concentration": 1},
    ),
    Family(
        dist.VonMises,
        _von_mises_statistics,
        {},
        log_density=_von_mises_log_density,
        natural=NaturalForm(
            ("loc", "concentration"),
            _von_mises_coefficients,
            _von_mises_derivatives,
            shapes=("concentration",),
        ),
    ),
)
