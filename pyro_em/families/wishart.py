"""Wishart: a scale matrix in closed form, degrees of freedom by Newton's method.

    log p(Λ | ν, V) = ½ (ν − D − 1) log det Λ − ½ tr(V⁻¹ Λ) − ½ ν log det V − ½ ν D log 2 − log Γ_D(½ ν)

Given ν the scale matrix is V = Σ w Λ / (ν Σ w). Degrees of freedom are found with the scale matrices at
these maximisers (`pyro_em.updates.closed_forms.degrees`).
"""

from __future__ import annotations

import pyro.distributions as dist
from torch import Tensor

from pyro_em.families.family import CHOLESKY, PRECISION, Arguments, Family, Rule, Statistics
from pyro_em.families.forms import Kind
from pyro_em.families.normal import precision_matrix


def _matrix(value: Tensor, arguments: Arguments) -> Statistics:
    return {"matrix": value, "log_det": value.logdet()}


def _root_of_diagonal(value: Tensor) -> Tensor:
    """The size of a matrix as a covariance has it. # (*batch, D)"""
    return value.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()


def _scale_matrix(stats: Statistics, arguments: Arguments) -> tuple[Tensor, Tensor]:
    """−½ ν Σ w log det V − ½ tr(V⁻¹ Σ w Λ): the form of a covariance, the degrees of freedom given."""
    return stats["matrix"], (stats["weight"] * arguments["df"])[..., None, None]


def _distance(stats: Statistics, arguments: Arguments) -> Tensor:
    """½ tr(V⁻¹ Σ w Λ). # (*cells)"""
    return (precision_matrix(arguments) * stats["matrix"]).sum((-2, -1)) / 2


def _half_degrees(stats: Statistics, arguments: Arguments) -> Tensor:
    return stats["weight"] * arguments["df"] * (stats["matrix"].shape[-1] / 2)


def _multiple(stats: Statistics, arguments: Arguments) -> tuple[Tensor, Tensor]:
    return _distance(stats, arguments), _half_degrees(stats, arguments)


def _multiple_of_inverse(stats: Statistics, arguments: Arguments) -> tuple[Tensor, Tensor]:
    return _half_degrees(stats, arguments), _distance(stats, arguments)


FAMILIES = (
    Family(
        dist.Wishart,
        _matrix,
        {
            "covariance_matrix": Rule(Kind.COVARIANCE, _scale_matrix),
            "scale_tril": Rule(Kind.COVARIANCE, _scale_matrix, CHOLESKY),
            "precision_matrix": Rule(Kind.COVARIANCE, _scale_matrix, PRECISION),
        },
        constants=("df",),
        event_dim=2,
        multiples={
            "covariance_matrix": Rule(Kind.ABSOLUTE_SCALE, _multiple),
            "precision_matrix": Rule(Kind.RATE, _multiple_of_inverse),
        },
        degrees="df",
        magnitude=_root_of_diagonal,
    ),
)
