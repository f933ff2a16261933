"""HalfNormal, Chi2 and Pareto: one argument, and one number of each datum.

    HalfNormal  log p(x | σ) = −x² / (2 σ²) − log σ + ½ log(2/π)                        x ≥ 0
    Chi2        log p(x | ν) = (ν/2 − 1) log x − x/2 − ν/2 log 2 − log Γ(ν/2)           x > 0
    Pareto      log p(x | m, α) = log α − α log(x / m) − log x                          x ≥ m

The scale of a HalfNormal is the root of the mean square. The shape of a Pareto is a rate, of one event
in log(x / m) units of exposure. That of a Chi2, a Gamma of known rate, is found by Newton's method.
"""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_em.families.exponential import FAR
from pyro_em.families.family import Arguments, Family, NaturalForm, Rule, Statistics
from pyro_em.families.forms import Kind


def _square_statistics(x: Tensor, a: Arguments) -> Statistics:
    return {"feature": x.square().unsqueeze(-1)}


def _square(s: Statistics, a: Arguments) -> tuple[Tensor, Tensor]:
    return s["feature"][..., 0], s["weight"]


def _half_normal_coefficients(a: Arguments, P: int) -> Tensor:
    scale = a["scale"]
    return torch.stack([-0.5 / scale.square(), 0.5 * math.log(2 / math.pi) - scale.log()], -1)


def _chi2_statistics(x: Tensor, a: Arguments) -> Statistics:
    return {"feature": torch.stack([x.log().clamp(min=-FAR), x], -1)}


def _chi2_coefficients(a: Arguments, P: int) -> Tensor:
    half = a["df"] / 2
    of_x = torch.full_like(half, -0.5)
    return torch.stack([half - 1, of_x, -half * math.log(2) - half.lgamma()], -1)


def _chi2_derivatives(s: Statistics, a: Arguments) -> tuple[Tensor, Tensor]:
    half, w = a["df"] / 2, s["weight"]
    slope = 0.5 * (s["feature"][..., 0] - w * (math.log(2) + half.digamma()))
    curved = -0.25 * w * torch.special.polygamma(1, half)
    return slope.unsqueeze(-1), curved.unsqueeze(-1).unsqueeze(-1)


def _pareto_statistics(x: Tensor, a: Arguments) -> Statistics:
    # Data below the scale have no density, and so no weight.
    exposure = (x / a["scale"]).log().clamp(min=0)
    return {"event": torch.ones_like(exposure), "exposure": exposure}


def _pareto_log_density(x: Tensor, a: Arguments) -> Tensor:
    scale, alpha = a["scale"], a["alpha"]
    found = alpha.log() - alpha * (x / scale).log() - x.log()
    return torch.where(x >= scale, found, -torch.inf)


FAMILIES = (
    Family(
        dist.HalfNormal,
        _square_statistics,
        {"scale": Rule(Kind.SCALE, _square)},
        natural=NaturalForm(("scale",), _half_normal_coefficients),
    ),
    Family(
        dist.Chi2,
        _chi2_statistics,
        {},
        natural=NaturalForm(("df",), _chi2_coefficients, _chi2_derivatives),
    ),
    Family(
        dist.Pareto,
        _pareto_statistics,
        {"alpha": Rule(Kind.RATE, lambda s, a: (s["event"], s["exposure"]))},
        log_density=_pareto_log_density,
        constants=("scale",),
    ),
)
