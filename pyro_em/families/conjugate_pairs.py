"""Conjugate pairs: what a child adds to the kernel of the latent that it reads.

The log density of a conjugate child is linear in the statistics of its latent's prior
(`pyro_em.families.conjugate_kernels`),

    log p(x | λ) = Δχ(x)·t(λ) + log base(x),

so that the posterior is the kernel at χ + Σ Δχ, and the log evidence A(χ + Σ Δχ) − A(χ) + Σ log base. A
child reads its latent through one argument, f λ^e with a known positive factor f. A new pair is a
function, or two, and an entry of `PAIRS`.

Source: Gelman et al., "Bayesian Data Analysis" (3rd ed. 2013), chapter 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_em.families.conjugate_kernels import PriorKernel, together, together_with
from pyro_em.families.family import Arguments


@dataclass(frozen=True)
class Pair:
    """A child of a conjugate latent.

    Attributes:
        argument: The argument through which it reads the latent.
        delta: Δχ, from the value and the arguments at the latent's unit. # (*batch, P)
        log_base: log base in nats. # (*batch,)
        counts: Arguments beside the latent's that decide how many events a value stands for: where
            parameters reach them, the latent at its mean does not stand for its posterior.
    """

    argument: str
    delta: Callable[[Tensor, Arguments], Tensor]
    log_base: Callable[[Tensor, Arguments], Tensor]
    counts: tuple[str, ...] = ()


def _no_base(x: Tensor, a: Arguments) -> Tensor:
    return torch.zeros((), dtype=torch.float64, device=x.device)


# ---------------------------------------------------------------------------- g under a Gamma


def _poisson(x: Tensor, a: Arguments) -> Tensor:
    return together(x.to(a["rate"]), a["rate"])


def _poisson_base(x: Tensor, a: Arguments) -> Tensor:
    rate = a["rate"]
    # No event is possible without exposure, and none then says nothing.
    events = torch.where(x == 0, 0.0, x * torch.where(x == 0, 1.0, rate).log())
    return events - (x + 1).lgamma()


def _exponential(x: Tensor, a: Arguments) -> Tensor:
    return together(torch.ones_like(x), a["rate"] * x)


def _exponential_base(x: Tensor, a: Arguments) -> Tensor:
    return a["rate"].log()


def _gamma_rate(x: Tensor, a: Arguments) -> Tensor:
    return together(a["concentration"], a["rate"] * x)


def _gamma_rate_base(x: Tensor, a: Arguments) -> Tensor:
    shape = a["concentration"]
    return shape * a["rate"].log() + (shape - 1) * x.log() - shape.lgamma()


def _inverse_gamma_rate(x: Tensor, a: Arguments) -> Tensor:
    return together(a["concentration"], a["rate"] / x)


def _inverse_gamma_rate_base(x: Tensor, a: Arguments) -> Tensor:
    shape = a["concentration"]
    return shape * a["rate"].log() - (shape + 1) * x.log() - shape.lgamma()


def _half_square(x: Tensor, a: Arguments) -> Tensor:
    half = ((x - a["loc"]) / a["scale"]).square() / 2
    return together(torch.full_like(half, 0.5), half)


def _normal_base(x: Tensor, a: Arguments) -> Tensor:
    return -a["scale"].log() - 0.5 * math.log(2 * math.pi)


def _log_normal(x: Tensor, a: Arguments) -> Tensor:
    return _half_square(x.log(), a)


def _log_normal_base(x: Tensor, a: Arguments) -> Tensor:
    return _normal_base(x, a) - x.log()


def _deviation(x: Tensor, a: Arguments) -> Tensor:
    size = (x - a["loc"]).abs() / a["scale"]
    return together(torch.ones_like(size), size)


def _laplace_base(x: Tensor, a: Arguments) -> Tensor:
    return -(2 * a["scale"]).log()


def _half_distance(x: Tensor, a: Arguments) -> Tensor:
    """Of vectors whose covariance is a multiple of the variance."""
    tril = _tril_of(a)
    off = (x - a["loc"]).unsqueeze(-1)
    white = torch.linalg.solve_triangular(
        tril.expand(*torch.broadcast_shapes(tril.shape[:-2], off.shape[:-2]), *tril.shape[-2:]),
        off,
        upper=False,
    )
    half = white.square().sum((-2, -1)) / 2
    return together(torch.full_like(half, 0.5 * x.shape[-1]), half)


def _vector_base(x: Tensor, a: Arguments) -> Tensor:
    log_det = _tril_of(a).diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return -log_det - 0.5 * x.shape[-1] * math.log(2 * math.pi)


def _tril_of(a: Arguments) -> Tensor:
    if "scale_tril" in a:
        return a["scale_tril"]
    if "covariance_matrix" in a:
        return torch.linalg.cholesky(a["covariance_matrix"])
    return torch.linalg.cholesky(
        torch.cholesky_inverse(torch.linalg.cholesky(a["precision_matrix"]))
    )


# ---------------------------------------------------------------------------- probabilities


def _bernoulli(x: Tensor, a: Arguments) -> Tensor:
    return together(x, 1 - x)


def _binomial(x: Tensor, a: Arguments) -> Tensor:
    return together(x, a["total_count"] - x)


def _binomial_base(x: Tensor, a: Arguments) -> Tensor:
    n = a["total_count"]
    return (n + 1).lgamma() - (x + 1).lgamma() - (n - x + 1).lgamma()


def _geometric(x: Tensor, a: Arguments) -> Tensor:
    return together(torch.ones_like(x), x)


def _negative_binomial(x: Tensor, a: Arguments) -> Tensor:
    return together(x, a["total_count"].to(x))


def _negative_binomial_base(x: Tensor, a: Arguments) -> Tensor:
    r = a["total_count"].to(x)
    return (x + r).lgamma() - r.lgamma() - (x + 1).lgamma()


def _categorical(x: Tensor, a: Arguments) -> Tensor:
    given = a["probs"] if "probs" in a else a["logits"]
    out = given.new_zeros(*x.shape, given.shape[-1])
    return out.scatter_(-1, x.long().unsqueeze(-1), 1.0)


def _counts(x: Tensor, a: Arguments) -> Tensor:
    return x


def _multinomial_base(x: Tensor, a: Arguments) -> Tensor:
    return (x.sum(-1) + 1).lgamma() - (x + 1).lgamma().sum(-1)


# ---------------------------------------------------------------------------- precision matrices


def _factor(a: Arguments) -> Tensor:
    """The number that multiplies the latent, whose unit has ones on its diagonal."""
    return a["precision_matrix"][..., 0, 0]


def _outer_square(x: Tensor, a: Arguments) -> Tensor:
    d = (x - a["loc"]) * _factor(a).sqrt().unsqueeze(-1)
    return together_with(torch.ones_like(d[..., 0]), d.unsqueeze(-1) * d.unsqueeze(-2))


def _multivariate_normal_base(x: Tensor, a: Arguments) -> Tensor:
    return 0.5 * x.shape[-1] * (_factor(a) / (2 * math.pi)).log()


_BY_COUNT = ("concentration",)

# By the kernel's kind, the child's class, its argument, and the power of g in it.
PAIRS: Mapping[tuple[str, type, str, float], Pair] = {
    ("gamma", dist.Poisson, "rate", 1.0): Pair("rate", _poisson, _poisson_base),
    ("gamma", dist.Exponential, "rate", 1.0): Pair("rate", _exponential, _exponential_base),
    ("gamma", dist.Gamma, "rate", 1.0): Pair("rate", _gamma_rate, _gamma_rate_base, _BY_COUNT),
    ("gamma", dist.InverseGamma, "rate", 1.0): Pair(
        "rate", _inverse_gamma_rate, _inverse_gamma_rate_base, _BY_COUNT
    ),
    ("gamma", dist.Normal, "scale", -0.5): Pair("scale", _half_square, _normal_base),
    ("gamma", dist.LogNormal, "scale", -0.5): Pair("scale", _log_normal, _log_normal_base),
    **{
        ("gamma", dist.MultivariateNormal, argument, power): Pair(
            argument, _half_distance, _vector_base
        )
        for argument, power in (
            ("covariance_matrix", -1.0),
            ("precision_matrix", 1.0),
            ("scale_tril", -0.5),
        )
    },
    ("gamma", dist.Laplace, "scale", -1.0): Pair("scale", _deviation, _laplace_base),
    **{
        (kind, child, argument, 1.0): Pair(argument, *rest)
        for argument in ("probs", "logits")
        for kind, child, *rest in (
            ("beta", dist.Bernoulli, _bernoulli, _no_base),
            ("beta", dist.Binomial, _binomial, _binomial_base),
            ("beta", dist.Geometric, _geometric, _no_base),
            (
                "beta",
                dist.NegativeBinomial,
                _negative_binomial,
                _negative_binomial_base,
                ("total_count",),
            ),
            ("dirichlet", dist.Categorical, _categorical, _no_base),
            ("dirichlet", dist.OneHotCategorical, _counts, _no_base),
            ("dirichlet", dist.Multinomial, _counts, _multinomial_base),
        )
    },
    ("wishart", dist.MultivariateNormal, "precision_matrix", 1.0): Pair(
        "precision_matrix", _outer_square, _multivariate_normal_base
    ),
}


def pair_of(kernel: PriorKernel, child: type, argument: str, power: float) -> Pair | None:
    """How a child that reads f λ^power of a latent is conjugate to it; None where it is not.

    Args:
        kernel: The latent's prior.
        child: The child's exact class.
        argument: The argument that reads the latent.
        power: The power of the latent in it.

    Example:
        >>> from pyro_em.families.conjugate_kernels import KERNELS
        >>> rate = KERNELS[dist.Gamma]
        >>> pair = pair_of(rate, dist.Poisson, "rate", 1.0)
        >>> pair.delta(torch.tensor(3.0), {"rate": torch.tensor(2.0)})  # three events in two units
        tensor([3., 2.])
    """
    return PAIRS.get((kernel.kind, child, argument, power * kernel.power))


def children_of(kernel: PriorKernel) -> str:
    """The arguments that may read a latent of some prior, in words."""
    maps = {1.0: "", -1.0: " (reciprocal)", 0.5: " (sqrt)", -0.5: " (rsqrt)"}
    return ", ".join(
        f"{child.__name__}.{argument}{maps[power * kernel.power]}"
        for kind, child, argument, power in PAIRS
        if kind == kernel.kind
    )
