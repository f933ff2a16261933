"""Cauchy and HalfCauchy: a Student distribution of one degree of freedom, whose precision is a latent.

    u ~ Gamma(1/2, 1/2),    x | u ~ Normal(μ, σ / √u),    E[u] = 2 / (1 + z²),    z = (x − μ) / σ

Given Σ E[u], Σ E[u] d and Σ E[u] d², d = x − μ at the E-step, the location is the weighted mean and the
squared scale the weighted mean square over the number of data, and both together raise the evidence
(`pyro_em.families.student`). A HalfCauchy is what lies right of a location of zero.

Source: Lange, Little and Taylor (1989), "Robust statistical modeling using the t distribution", Journal
of the American Statistical Association 84.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_em.families.family import Arguments, Family, NaturalForm, Statistics
from pyro_em.families.student import derivatives_of_line, residual


@dataclass(frozen=True)
class CauchyMixture(NaturalForm):
    """What sums say of a Cauchy distribution whose precisions are latents.

    ``feature`` holds Σ E[u], Σ E[u] d and Σ E[u] d², where d is about ``reference:loc``; that of a
    HalfCauchy holds Σ E[u] x² alone.
    """

    def terms(self, statistics: Statistics, arguments: Arguments) -> Tensor:
        """See `NaturalForm.terms`."""
        scale, w = arguments["scale"], statistics["weight"]
        total = (
            residual(statistics, arguments) if self.references else statistics["feature"][..., 0]
        )
        parts = torch.broadcast_tensors(-w * scale.log(), -0.5 * total / scale**2)
        return torch.where(w.unsqueeze(-1) == 0, 0.0, torch.stack(parts, -1))


def _precisions(x: Tensor, loc: Tensor | float, scale: Tensor) -> tuple[Tensor, Tensor]:
    """d and E[u]."""
    d = x - loc
    return d, 2 / (1 + (d / scale).square())


def _statistics(x: Tensor, a: Arguments) -> Statistics:
    d, mean = _precisions(x, a["loc"], a["scale"])
    weighed = mean * d
    return {"feature": torch.stack(torch.broadcast_tensors(mean, weighed, weighed * d), -1)}


def _half_statistics(x: Tensor, a: Arguments) -> Statistics:
    d, mean = _precisions(x, 0.0, a["scale"])
    return {"feature": (mean * d * d).unsqueeze(-1)}


def _log_density(x: Tensor, a: Arguments) -> Tensor:
    z = (x - a["loc"]) / a["scale"]
    return -math.log(math.pi) - a["scale"].log() - z.square().log1p()


def _half_log_density(x: Tensor, a: Arguments) -> Tensor:
    z = x / a["scale"]
    found = math.log(2 / math.pi) - a["scale"].log() - z.square().log1p()
    return torch.where(x >= 0, found, -torch.inf)


def _maximum(s: Statistics, a: Arguments) -> Tensor:
    """Location and scale. # (*cells, 2)"""
    zeroth, first, second = s["feature"].unbind(-1)
    shift = first / zeroth
    scale = ((second - first * shift) / s["weight"]).sqrt()
    return torch.stack([s["reference:loc"] + shift, scale], -1)


def _half_derivatives(s: Statistics, a: Arguments) -> tuple[Tensor, Tensor]:
    scale, w = a["scale"], s["weight"]
    total = s["feature"][..., 0] / scale**2
    slope, curved = (total - w) / scale, (w - 3 * total) / scale**2
    return slope.unsqueeze(-1), curved.unsqueeze(-1).unsqueeze(-1)


def _half_maximum(s: Statistics, a: Arguments) -> Tensor:
    """The scale. # (*cells, 1)"""
    return (s["feature"][..., 0] / s["weight"]).sqrt().unsqueeze(-1)


FAMILIES = (
    Family(
        dist.Cauchy,
        _statistics,
        {},
        log_density=_log_density,
        natural=CauchyMixture(
            ("loc", "scale"),
            derivatives=derivatives_of_line,
            references=("loc",),
            is_augmented=True,
            spread=("scale", "loc"),
            maximum=_maximum,
        ),
    ),
    Family(
        dist.HalfCauchy,
        _half_statistics,
        {},
        log_density=_half_log_density,
        natural=CauchyMixture(
            ("scale",), derivatives=_half_derivatives, is_augmented=True, maximum=_half_maximum
        ),
    ),
)
