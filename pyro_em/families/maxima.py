"""Maximisers of densities in linear form from their sums, a handful of operations for all cells.

    Gamma       log α − ψ(α) = log x̄ − mean log x,        β = α / x̄
    Student     log ½ν − ψ(½ν) = −mean (log u − u + 1),    μ = Σ u x / Σ u,   σ² = Σ u (x − μ)² / n
    Dirichlet   ψ(α_i) − ψ(Σ α) = mean log x_i

Each has one root. What lies at the edge of what numbers can tell gives none, and is left to a search
that names it.

Source: Minka (2002), "Estimating a Gamma distribution"; Minka (2000), "Estimating a Dirichlet
distribution".
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_em.families.family import Arguments, Statistics

_LEAST = 1e-6  # of log x̄ − mean log x: what is smaller has lost too many digits in a difference

_STEPS = 20

_LAST = 1e-7  # a relative step after which the next is lost in rounding: convergence is quadratic


def shape_of(off: Tensor) -> Tensor | None:
    """The root α of log α − ψ(α) = off; None where numbers do not tell it.

    Example:
        >>> shape_of(torch.tensor([1 - 0.5772156649015329], dtype=torch.float64).neg_().add_(1))
        tensor([1.0000], dtype=torch.float64)
    """
    if not bool((off > _LEAST).all()):
        return None
    away = off - 3
    shape = ((away.square() + 24 * off).sqrt_() - away) / (12 * off)
    for _ in range(_STEPS):
        inverse = shape.reciprocal()
        slope = shape.log() - shape.digamma() - off
        bend = inverse - torch.special.polygamma(1, shape)
        new = (inverse + slope * inverse.square() / bend).reciprocal_()
        length = ((new - shape) * inverse).abs().amax()
        shape = new
        if float(length) <= _LAST:
            return shape
    return None


def gamma(s: Statistics, a: Arguments) -> Tensor | None:
    """Shape and rate of a Gamma from Σ log x and Σ x. # (*cells, 2)"""
    logs, sums = s["feature"].unbind(-1)
    return _shape_and_rate(logs / s["weight"], sums / s["weight"])


def inverse_gamma(s: Statistics, a: Arguments) -> Tensor | None:
    """The same from Σ log x and Σ 1 / x. # (*cells, 2)"""
    logs, sums = s["feature"].unbind(-1)
    return _shape_and_rate(-logs / s["weight"], sums / s["weight"])


def _shape_and_rate(logarithm: Tensor, mean: Tensor) -> Tensor | None:
    shape = shape_of(mean.log() - logarithm)
    return None if shape is None else torch.stack([shape, shape / mean], -1)


def student(s: Statistics, a: Arguments) -> Tensor | None:
    """Degrees of freedom, location and scale from expected precisions. # (*cells, 3)"""
    zeroth, first, second, rest = s["feature"].unbind(-1)
    half = shape_of(-rest / s["weight"])
    if half is None:
        return None
    shift = first / zeroth
    scale = ((second - first * shift) / s["weight"]).sqrt()
    return torch.stack([2 * half, s["reference:loc"] + shift, scale], -1)


def dirichlet(s: Statistics, alpha: Tensor) -> Tensor | None:
    """Concentrations from Σ log x_i, by Newton steps from where they are. # (*cells, C)

    Args:
        s: Sums.
        alpha: # (*cells, C)
    """
    mean = s["feature"] / s["weight"].unsqueeze(-1)
    for _ in range(_STEPS):
        total = alpha.sum(-1, keepdim=True)
        slope = total.digamma() - alpha.digamma() + mean
        own = torch.special.polygamma(1, alpha).reciprocal_()
        shared = torch.special.polygamma(1, total)
        pull = (slope * own).sum(-1, keepdim=True) / (1 / shared - own.sum(-1, keepdim=True))
        step = (slope + pull) * own
        alpha = alpha + step
        if not bool((alpha > 0).all()):
            return None
        if float((step / alpha).abs().amax()) <= _LAST:
            return alpha
    return None
