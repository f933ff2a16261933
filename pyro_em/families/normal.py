"""Normal, LogNormal, MultivariateNormal and Laplace.

Squares are taken about the location of the E-step, d = x − loc, so that nothing cancels near the
optimum: with δ = new loc − old loc,

    Σ w (x − loc_new)² = Σ w d² − 2 δ Σ w d + δ² Σ w.

The rules below receive the *current* arguments and, as the statistic ``reference:loc``, the location
about which the squares were taken.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_em.families.family import (
    CHOLESKY,
    PRECISION,
    Arguments,
    Family,
    NaturalForm,
    Rule,
    Statistics,
    weigh,
)
from pyro_em.families.forms import Kind

_FEW_NUMBERS = 4096  # below which operations are counted, not what they do


def _deviations(value: Tensor, arguments: Arguments) -> Statistics:
    d = value - arguments["loc"]
    return {"deviation": d, "square": d * d}


def _normal_log_density(value: Tensor, arguments: Arguments) -> Tensor:
    d = (value - arguments["loc"]) / arguments["scale"]
    return -0.5 * (d * d + math.log(2 * math.pi)) - arguments["scale"].log()


def _log_normal_log_density(value: Tensor, arguments: Arguments) -> Tensor:
    return _normal_log_density(value.log(), arguments) - value.log()


def _log_deviations(value: Tensor, arguments: Arguments) -> Statistics:
    return _deviations(value.log(), arguments)


def _mean(stats: Statistics, arguments: Arguments) -> tuple[Tensor, Tensor]:
    precision = arguments["scale"] ** -2
    weight = stats["weight"] * precision
    return (stats["deviation"] + stats["weight"] * stats["reference:loc"]) * precision, weight


def _variance(stats: Statistics, arguments: Arguments) -> tuple[Tensor, Tensor]:
    shift = arguments["loc"] - stats["reference:loc"]
    total = stats["square"] - 2 * shift * stats["deviation"] + shift**2 * stats["weight"]
    return total, stats["weight"].expand(total.shape)


def _scatter(
    weights: Tensor, value: Tensor, arguments: Arguments, keep: tuple[bool, ...]
) -> Statistics:
    return scatter(weights, value - arguments["loc"], keep)


def scatter(weights: Tensor, d: Tensor, keep: tuple[bool, ...]) -> Statistics:
    """Σ w d and Σ w d dᵀ without a (*batch, D, D) tensor: batched matrix products.

    Args:
        weights: # (*batch)
        d: Deviations from the location. # (*batch or 1s, D)
        keep: For each batch dimension, whether the result keeps it.
    """
    first = weigh(weights, d, keep)
    n_batch = weights.dim()
    batch = torch.broadcast_shapes(weights.shape, d.shape[:-1])
    d = d.expand(*batch, d.shape[-1])
    w = weights.expand(batch)
    kept_axes = [i for i in range(n_batch) if keep[i]]
    summed = [i for i in range(n_batch) if not keep[i]]
    d = d.permute(*kept_axes, *summed, n_batch).reshape(
        *[batch[i] for i in kept_axes], -1, d.shape[-1]
    )
    w = w.permute(*kept_axes, *summed).reshape(*[batch[i] for i in kept_axes], -1, 1)
    second = (w * d).mT @ d
    shape = [batch[i] if keep[i] else 1 for i in range(n_batch)]
    return {"deviation": first, "square": second.reshape(*shape, *second.shape[-2:])}


def precision_matrix(arguments: Arguments) -> Tensor:
    """Λ, whichever spread is given. # (*batch, D, D)"""
    if "precision_matrix" in arguments:
        return arguments["precision_matrix"]
    if "scale_tril" in arguments:
        return torch.cholesky_inverse(arguments["scale_tril"])
    return torch.cholesky_inverse(torch.linalg.cholesky(arguments["covariance_matrix"]))


def mean_vector(stats: Statistics, arguments: Arguments) -> tuple[Tensor, Tensor]:
    """Λ Σ w x and Λ Σ w: the rule of a mean vector."""
    precision = precision_matrix(arguments)
    weight = stats["weight"].unsqueeze(-1)
    total = stats["deviation"] + weight * stats["reference:loc"]
    return (precision @ total.unsqueeze(-1)).squeeze(-1), precision * weight.unsqueeze(-1)


def _covariance(stats: Statistics, arguments: Arguments) -> tuple[Tensor, Tensor]:
    shift = (arguments["loc"] - stats["reference:loc"]).unsqueeze(-1)
    first = stats["deviation"].unsqueeze(-1)
    weight = stats["weight"][..., None, None]
    cross = first @ shift.mT
    total = stats["square"] - cross - cross.mT + weight * (shift @ shift.mT)
    return total, weight


def _squared_distance(stats: Statistics, arguments: Arguments) -> Tensor:
    """Σ w (x − loc)ᵀ Λ (x − loc). # (*cells)"""
    total, _ = _covariance(stats, arguments)
    return (precision_matrix(arguments) * total).sum((-2, -1))


def _multiple_of_variance(stats: Statistics, arguments: Arguments) -> tuple[Tensor, Tensor]:
    """−½ D Σ w log a − ½ q / a, with q the squared distance where the covariance has a = 1."""
    distance = _squared_distance(stats, arguments)
    return distance / 2, _half_count(stats, arguments)


def _multiple_of_scale(stats: Statistics, arguments: Arguments) -> tuple[Tensor, Tensor]:
    """−D Σ w log a − ½ q / a²."""
    return _squared_distance(stats, arguments), 2 * _half_count(stats, arguments)


def _multiple_of_precision(stats: Statistics, arguments: Arguments) -> tuple[Tensor, Tensor]:
    """½ D Σ w log a − ½ q a."""
    distance = _squared_distance(stats, arguments)
    return _half_count(stats, arguments), distance / 2


def _half_count(stats: Statistics, arguments: Arguments) -> Tensor:
    """Half of how many numbers there are. # (*cells)"""
    return stats["weight"] * (arguments["loc"].shape[-1] / 2)


def _multivariate_normal_log_density(value: Tensor, arguments: Arguments) -> Tensor:
    if "scale_tril" in arguments:
        tril = arguments["scale_tril"]
    elif "covariance_matrix" in arguments:
        tril = torch.linalg.cholesky(arguments["covariance_matrix"])
    else:
        # Λ = U Uᵀ reversed gives the Cholesky factor of Λ⁻¹ without forming the inverse.
        flipped = torch.linalg.cholesky(arguments["precision_matrix"].flip(-2, -1))
        upper = flipped.flip(-2, -1).mT
        eye = torch.eye(upper.shape[-1], dtype=upper.dtype, device=upper.device)
        tril = torch.linalg.solve_triangular(upper, eye, upper=False)
    loc = arguments["loc"]
    n_batch = max(value.dim(), loc.dim(), tril.dim() - 1) - 1
    value, loc = _led_by(value, n_batch + 1), _led_by(loc, n_batch + 1)
    tril = _led_by(tril, n_batch + 2)
    # Dimensions that share one matrix become right-hand sides of one triangular solve.
    shared = [i for i in range(n_batch) if tril.shape[i] == 1]
    matrix_axes = [i for i in range(n_batch) if tril.shape[i] != 1]
    n, D = len(matrix_axes), tril.shape[-1]
    axes = (*matrix_axes, n_batch, *shared)
    if value.numel() * loc.numel() <= D * _FEW_NUMBERS:
        d = (value - loc).permute(axes)
    else:  # what is small is laid out anew, not the differences
        d = value.permute(axes).contiguous() - loc.permute(axes).contiguous()
    matrix = tril.reshape([*(tril.shape[i] for i in matrix_axes), D, D])
    rows = d.flatten(n + 1) if shared else d.unsqueeze(-1)
    if rows.shape[-1] <= D or rows.numel() <= _FEW_NUMBERS:
        white = torch.linalg.solve_triangular(matrix, rows, upper=False)
    else:  # inverting the small triangle once and multiplying is faster with many columns
        eye = torch.eye(D, dtype=matrix.dtype, device=matrix.device)
        white = torch.linalg.solve_triangular(matrix, eye, upper=False) @ rows
    distance = (white * white).sum(-2)
    distance = distance.reshape(distance.shape[:n] + d.shape[n + 1 :])
    order = matrix_axes + shared
    distance = distance.permute([order.index(i) for i in range(n_batch)])
    log_det = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return torch.add(torch.rsub(log_det, -0.5 * D * math.log(2 * math.pi)), distance, alpha=-0.5)


def _led_by(t: Tensor, dims: int) -> Tensor:
    """A tensor with as many dimensions, those that it lacks on the left of size one."""
    return t if t.dim() == dims else t.reshape((1,) * (dims - t.dim()) + t.shape)


@dataclass(frozen=True)
class LocationAndScale(NaturalForm):
    """What sums say of location and scale together: Σ d and Σ d² about ``reference:loc``."""

    def terms(self, statistics: Statistics, arguments: Arguments) -> Tensor:
        """See `NaturalForm.terms`."""
        scale, w = arguments["scale"], statistics["weight"]
        spread = -0.5 * _residual(statistics, arguments) / scale**2
        parts = torch.broadcast_tensors(-w * scale.log(), spread)
        return torch.where(w.unsqueeze(-1) == 0, 0.0, torch.stack(parts, -1))


def _residual(s: Statistics, a: Arguments) -> Tensor:
    """Σ (x − μ)²."""
    (first, second), shift = s["feature"].unbind(-1), a["loc"] - s["reference:loc"]
    return second - shift * (2 * first - shift * s["weight"])


def _location_and_scale(s: Statistics, a: Arguments) -> tuple[Tensor, Tensor]:
    """Derivatives of −w log σ − Σ (x − μ)² / (2 σ²)."""
    scale, w, shift = a["scale"], s["weight"], a["loc"] - s["reference:loc"]
    precision = scale**-2
    pull = (s["feature"][..., 0] - shift * w) * precision
    residual = _residual(s, a) * precision
    slope = torch.stack(torch.broadcast_tensors(pull, (residual - w) / scale), -1)
    mixed = -2 * pull / scale
    rows = (-w * precision, mixed, mixed, (w - 3 * residual) * precision)
    return slope, torch.stack(torch.broadcast_tensors(*rows), -1).unflatten(-1, (2, 2))


def _deviation_and_square(s: Statistics) -> Tensor:
    return torch.stack(torch.broadcast_tensors(s["deviation"], s["square"]), -1)


LOCATION_AND_SCALE = LocationAndScale(
    ("loc", "scale"),
    derivatives=_location_and_scale,
    references=("loc",),
    spread=("scale", "loc"),
    gathered=_deviation_and_square,
)


def _laplace_statistics(value: Tensor, arguments: Arguments) -> Statistics:
    return {"absolute": (value - arguments["loc"]).abs()}


def _absolute_scale(stats: Statistics, arguments: Arguments) -> tuple[Tensor, Tensor]:
    return stats["absolute"], stats["weight"].expand(stats["absolute"].shape)


def _weighted_data(stats: Statistics, arguments: Arguments) -> tuple[Tensor, Tensor]:
    """The data and their weights in −Σ w abs(x − loc): a median is taken from these, not from sums."""
    return stats["event"], stats["weight"] / arguments["scale"]


SPREADS = {
    "covariance_matrix": Rule(Kind.COVARIANCE, _covariance),
    "scale_tril": Rule(Kind.COVARIANCE, _covariance, CHOLESKY),
    "precision_matrix": Rule(Kind.COVARIANCE, _covariance, PRECISION),
}


FAMILIES = (
    Family(
        dist.Normal,
        _deviations,
        {"loc": Rule(Kind.MEAN, _mean), "scale": Rule(Kind.SCALE, _variance)},
        log_density=_normal_log_density,
        together=LOCATION_AND_SCALE,
    ),
    Family(
        dist.LogNormal,
        _log_deviations,
        {"loc": Rule(Kind.MEAN, _mean), "scale": Rule(Kind.SCALE, _variance)},
        log_density=_log_normal_log_density,
        magnitude=lambda x: x.log().abs(),
        together=LOCATION_AND_SCALE,
    ),
    Family(
        dist.MultivariateNormal,
        lambda x, a: {"deviation": x - a["loc"]},
        {"loc": Rule(Kind.MEAN_VECTOR, mean_vector), **SPREADS},
        log_density=_multivariate_normal_log_density,
        accumulate=_scatter,
        event_dim=1,
        multiples={
            "covariance_matrix": Rule(Kind.ABSOLUTE_SCALE, _multiple_of_variance),
            "scale_tril": Rule(Kind.SCALE, _multiple_of_scale),
            "precision_matrix": Rule(Kind.RATE, _multiple_of_precision),
        },
    ),
    Family(
        dist.Laplace,
        _laplace_statistics,
        {
            "loc": Rule(Kind.MEDIAN, _weighted_data),
            "scale": Rule(Kind.ABSOLUTE_SCALE, _absolute_scale),
        },
        additive=False,
    ),
)
