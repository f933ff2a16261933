"""StudentT as a Normal whose precision is drawn for each datum: a scale mixture.

    u ~ Gamma(ν/2, ν/2),    x | u ~ Normal(μ, σ / √u)

The E-step takes u in, whose posterior is a Gamma again: with z = (x − μ) / σ,

    E[u] = (ν + 1) / (ν + z²),    E[log u] = log E[u] + ψ((ν + 1)/2) − log((ν + 1)/2),

and what it says of ν, μ and σ is linear in sums of E[u], E[u] d, E[u] d² and E[log u] − E[u], where
d = x − μ at the E-step. Its maximiser raises the evidence as any M-step does.

Source: Lange, Little and Taylor (1989), "Robust statistical modeling using the t distribution", Journal
of the American Statistical Association 84; Liu and Rubin (1995), Statistica Sinica 5, for ν.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_em.families.family import Arguments, Family, NaturalForm, Statistics
from pyro_em.families.maxima import student
from pyro_em.families.predicted import log_rising


@dataclass(frozen=True)
class ScaleMixture(NaturalForm):
    """What sums say of a Student distribution whose precisions are latents.

    ``feature`` holds Σ E[u], Σ E[u] d, Σ E[u] d² and Σ (E[log u] − E[u] + 1), where d is about
    ``reference:loc``.
    """

    def terms(self, statistics: Statistics, arguments: Arguments) -> Tensor:
        """See `NaturalForm.terms`."""
        half, scale, w = arguments["df"] / 2, arguments["scale"], statistics["weight"]
        spread = -0.5 * residual(statistics, arguments) / scale**2
        of_df = w * (half * half.log() - half.lgamma() - half)
        parts = (-w * scale.log(), spread, of_df, half * statistics["feature"][..., 3])
        return torch.stack(torch.broadcast_tensors(*parts), -1)


def about(feature: Tensor, step: Tensor) -> Tensor:
    """A scale mixture's sums about a location that is further on by a step.

    Args:
        feature: Σ E[u], Σ E[u] d, Σ E[u] d², and what depends on no location. # (*cells, 3 or more)
        step: # (*cells)
    """
    zeroth, first, second, *rest = feature.unbind(-1)
    moved = (zeroth, first - step * zeroth, second - step * (2 * first - step * zeroth), *rest)
    return torch.stack(torch.broadcast_tensors(*moved), -1)


def residual(s: Statistics, a: Arguments) -> Tensor:
    """Σ E[u] (x − μ)². # (*cells)"""
    feature, shift = s["feature"], a["loc"] - s["reference:loc"]
    return feature[..., 2] - shift * (2 * feature[..., 1] - shift * feature[..., 0])


def derivatives_of_line(s: Statistics, a: Arguments) -> tuple[Tensor, Tensor]:
    """Those of −w log σ − ½ Σ E[u] (x − μ)² / σ² in location and scale.

    # (*cells, 2), (*cells, 2, 2)
    """
    scale, w = a["scale"], s["weight"]
    shift = a["loc"] - s["reference:loc"]
    total = residual(s, a) / scale**2
    pull = (s["feature"][..., 1] - shift * s["feature"][..., 0]) / scale**2
    mixed = -2 * pull / scale
    of_loc, of_scale = -s["feature"][..., 0] / scale**2, (w - 3 * total) / scale**2
    slopes = torch.broadcast_tensors(pull, (total - w) / scale)
    rows = torch.broadcast_tensors(of_loc, mixed, mixed, of_scale)
    return torch.stack(slopes, -1), torch.stack(rows, -1).unflatten(-1, (2, 2))


def _derivatives(s: Statistics, a: Arguments) -> tuple[Tensor, Tensor]:
    half, w = a["df"] / 2, s["weight"]
    of_df = 0.5 * (w * (half.log() - half.digamma()) + s["feature"][..., 3])
    bend = 0.25 * w * (1 / half - torch.special.polygamma(1, half))
    of_line, curved = derivatives_of_line(s, a)
    cells = torch.broadcast_shapes(of_df.shape, of_line.shape[:-1])
    slope = torch.cat([of_df.expand(cells).unsqueeze(-1), of_line.expand(*cells, 2)], -1)
    square = curved.new_zeros(*cells, 3, 3)
    square[..., 0, 0], square[..., 1:, 1:] = bend, curved
    return slope, square


def expected_logarithm(df: Tensor) -> Tensor:
    """E[log u] − log E[u] of a precision's posterior."""
    half = (df + 1) / 2
    return half.digamma() - half.log()


def _statistics(x: Tensor, a: Arguments) -> Statistics:
    df, deviation = a["df"], x - a["loc"]
    mean = (df + 1) / (df + (deviation / a["scale"]).square())
    logarithm = mean.log() + expected_logarithm(df) - mean + 1
    weighed = mean * deviation
    parts = torch.broadcast_tensors(mean, weighed, weighed * deviation, logarithm)
    return {"feature": torch.stack(parts, -1)}


def log_normaliser(df: Tensor, scale: Tensor) -> Tensor:
    """The logarithm of the density's largest value."""
    half = df / 2
    return log_rising(half, torch.full_like(half, 0.5)) - 0.5 * (df * math.pi).log() - scale.log()


def _log_density(x: Tensor, a: Arguments) -> Tensor:
    df, z = a["df"], (x - a["loc"]) / a["scale"]
    return log_normaliser(df, a["scale"]) - 0.5 * (df + 1) * (z * z / df).log1p()


FAMILIES = (
    Family(
        dist.StudentT,
        _statistics,
        {},
        log_density=_log_density,
        natural=ScaleMixture(
            ("df", "loc", "scale"),
            derivatives=_derivatives,
            references=("loc",),
            is_augmented=True,
            spread=("scale", "loc"),
            maximum=student,
        ),
    ),
)
