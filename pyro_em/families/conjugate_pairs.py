"""Latents whose posterior has the form of their prior: kernels of priors, and what children add.

A prior kernel has statistics t and hyperparameters χ,

    log p(λ | χ) = χ·t(λ) − A(χ) + h·t(λ),

and the log density of a conjugate child is linear in the same statistics,

    log p(x | λ) = Δχ(x)·t(λ) + log base(x),

so that the posterior is the kernel at χ + Σ Δχ, and the log evidence A(χ + Σ Δχ) − A(χ) + Σ log base.

| prior | t | A(χ) |
|---|---|---|
| Gamma(a, b), Exponential(b), InverseGamma(a, b) on g = 1/λ | log g, −g | log Γ(a) − a log b |
| Beta(a, b) | log p, log(1 − p) | log B(a, b) |
| Dirichlet(α) | log p | log B(α) |

A child reads its latent through one argument, f λ^e with a known positive factor f. A new pair is a
function, or two, and an entry of `PAIRS`.

Source: Gelman et al., "Bayesian Data Analysis" (3rd ed. 2013), chapter 2 and appendix A.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_em.families.family import Arguments, Statistics


@dataclass(frozen=True)
class PriorKernel:
    """The form that a prior and its posterior share.

    Attributes:
        distribution: The prior's exact class.
        kind: Which column of `PAIRS` serves it.
        support: ``"positive"``, ``"unit"`` or ``"simplex"``.
        power: What a power of the latent is a power of g to: 1, or −1 where g = 1/λ.
        chi: χ of a prior's arguments. # (*batch, P)
        normaliser: A(χ) in nats. # (*batch,)
        expected: E[t] at χ. # (*batch, P)
        base: h·t, the part of the log density free of χ. # (*batch,)
        arguments: The distribution's class and its arguments at χ.
        statistics: The family's statistics of the latent, in terms of E[t].
    """

    distribution: type
    kind: str
    support: str
    power: float
    chi: Callable[[Arguments], Tensor]
    normaliser: Callable[[Tensor], Tensor]
    expected: Callable[[Tensor], Tensor]
    base: Callable[[Tensor], Tensor]
    arguments: Callable[[Tensor], tuple[type, dict[str, Tensor]]]
    statistics: Callable[[Tensor], Statistics]

    @property
    def event_dim(self) -> int:
        """Dimensions of one latent's value."""
        return 1 if self.support == "simplex" else 0

    def unit(self, like: Tensor) -> Tensor:
        """The value at which an argument of a child is its known factor."""
        if self.support == "positive":
            return torch.ones_like(like)
        share = 1 / like.shape[-1] if self.support == "simplex" else 0.5
        return torch.full_like(like, share)

    def inside(self, real: Tensor) -> Tensor:
        """Values in the support, from any numbers."""
        if self.support == "positive":
            return (0.5 * real).exp()
        return real.softmax(-1) if self.support == "simplex" else real.sigmoid()

    def statistics_at(self, value: Tensor) -> Tensor:
        """t(λ). # (*batch, P)"""
        if self.support == "positive":
            g = value**self.power
            return torch.stack([g.log(), -g], -1)
        return (
            value.log() if self.support == "simplex" else _together(value.log(), (-value).log1p())
        )

    def log_density(self, t: Tensor, arguments: Arguments) -> Tensor:
        """E[log p(λ | χ)] where E[t] is known, in nats. # (*batch,)"""
        chi = self.chi(arguments)
        return (chi * t).sum(-1) - self.normaliser(chi) + self.base(t)

    def of(self, chi: Tensor) -> dist.Distribution:
        """The distribution at χ, with its own argument names."""
        distribution, arguments = self.arguments(chi)
        return distribution(**arguments)


@dataclass(frozen=True)
class Pair:
    """A child of a conjugate latent.

    Attributes:
        argument: The argument through which it reads the latent.
        delta: Δχ, from the value and the arguments at the latent's unit. # (*batch, P)
        log_base: log base in nats. # (*batch,)
        counts: Arguments beside the latent's that decide how many events a value stands for: where
            parameters reach them, the latent at its mean does not stand for its posterior.
        takes_factor: Whether a known factor may multiply the latent.
    """

    argument: str
    delta: Callable[[Tensor, Arguments], Tensor]
    log_base: Callable[[Tensor, Arguments], Tensor]
    counts: tuple[str, ...] = ()
    takes_factor: bool = False


def _together(*parts: Tensor) -> Tensor:
    return torch.stack(torch.broadcast_tensors(*parts), -1)


def _no_base(x: Tensor, a: Arguments) -> Tensor:
    return torch.zeros((), dtype=torch.float64, device=x.device)


# ---------------------------------------------------------------------------- g under a Gamma


def _gamma_chi(a: Arguments) -> Tensor:
    return _together(a["concentration"], a["rate"])


def _exponential_chi(a: Arguments) -> Tensor:
    return _together(torch.ones_like(a["rate"]), a["rate"])


def _gamma_normaliser(chi: Tensor) -> Tensor:
    shape, rate = chi.unbind(-1)
    return shape.lgamma() - shape * rate.log()


def _gamma_expected(chi: Tensor) -> Tensor:
    shape, rate = chi.unbind(-1)
    return torch.stack([shape.digamma() - rate.log(), -shape / rate], -1)


def _less_log(t: Tensor) -> Tensor:
    return -t[..., 0]


def _log(t: Tensor) -> Tensor:
    return t[..., 0]


def _gamma_at(chi: Tensor) -> tuple[type, dict[str, Tensor]]:
    return dist.Gamma, {"concentration": chi[..., 0], "rate": chi[..., 1]}


def _inverse_gamma_at(chi: Tensor) -> tuple[type, dict[str, Tensor]]:
    return dist.InverseGamma, {"concentration": chi[..., 0], "rate": chi[..., 1]}


def _gamma_features(t: Tensor) -> Statistics:
    return {"feature": torch.stack([t[..., 0], -t[..., 1]], -1)}


def _inverse_gamma_features(t: Tensor) -> Statistics:
    return {"feature": -t}


def _exponential_statistics(t: Tensor) -> Statistics:
    return {"event": torch.ones_like(t[..., 0]), "exposure": -t[..., 1]}


def _poisson(x: Tensor, a: Arguments) -> Tensor:
    return _together(x.to(a["rate"]), a["rate"])


def _poisson_base(x: Tensor, a: Arguments) -> Tensor:
    rate = a["rate"]
    # No event is possible without exposure, and none then says nothing.
    events = torch.where(x == 0, 0.0, x * torch.where(x == 0, 1.0, rate).log())
    return events - (x + 1).lgamma()


def _exponential(x: Tensor, a: Arguments) -> Tensor:
    return _together(torch.ones_like(x), a["rate"] * x)


def _exponential_base(x: Tensor, a: Arguments) -> Tensor:
    return a["rate"].log()


def _gamma_rate(x: Tensor, a: Arguments) -> Tensor:
    return _together(a["concentration"], a["rate"] * x)


def _gamma_rate_base(x: Tensor, a: Arguments) -> Tensor:
    shape = a["concentration"]
    return shape * a["rate"].log() + (shape - 1) * x.log() - shape.lgamma()


def _inverse_gamma_rate(x: Tensor, a: Arguments) -> Tensor:
    return _together(a["concentration"], a["rate"] / x)


def _inverse_gamma_rate_base(x: Tensor, a: Arguments) -> Tensor:
    shape = a["concentration"]
    return shape * a["rate"].log() - (shape + 1) * x.log() - shape.lgamma()


def _half_square(x: Tensor, a: Arguments) -> Tensor:
    half = ((x - a["loc"]) / a["scale"]).square() / 2
    return _together(torch.full_like(half, 0.5), half)


def _normal_base(x: Tensor, a: Arguments) -> Tensor:
    return -a["scale"].log() - 0.5 * math.log(2 * math.pi)


def _log_normal(x: Tensor, a: Arguments) -> Tensor:
    return _half_square(x.log(), a)


def _log_normal_base(x: Tensor, a: Arguments) -> Tensor:
    return _normal_base(x, a) - x.log()


def _deviation(x: Tensor, a: Arguments) -> Tensor:
    size = (x - a["loc"]).abs() / a["scale"]
    return _together(torch.ones_like(size), size)


def _laplace_base(x: Tensor, a: Arguments) -> Tensor:
    return -(2 * a["scale"]).log()


# ---------------------------------------------------------------------------- probabilities


def _beta_chi(a: Arguments) -> Tensor:
    return _together(a["concentration1"], a["concentration0"])


def _dirichlet_chi(a: Arguments) -> Tensor:
    return a["concentration"]


def _simplex_normaliser(chi: Tensor) -> Tensor:
    return chi.lgamma().sum(-1) - chi.sum(-1).lgamma()


def _simplex_expected(chi: Tensor) -> Tensor:
    return chi.digamma() - chi.sum(-1, keepdim=True).digamma()


def _less_sum(t: Tensor) -> Tensor:
    return -t.sum(-1)


def _beta_at(chi: Tensor) -> tuple[type, dict[str, Tensor]]:
    return dist.Beta, {"concentration1": chi[..., 0], "concentration0": chi[..., 1]}


def _dirichlet_at(chi: Tensor) -> tuple[type, dict[str, Tensor]]:
    return dist.Dirichlet, {"concentration": chi}


def _features(t: Tensor) -> Statistics:
    return {"feature": t}


def _bernoulli(x: Tensor, a: Arguments) -> Tensor:
    return _together(x, 1 - x)


def _binomial(x: Tensor, a: Arguments) -> Tensor:
    return _together(x, a["total_count"] - x)


def _binomial_base(x: Tensor, a: Arguments) -> Tensor:
    n = a["total_count"]
    return (n + 1).lgamma() - (x + 1).lgamma() - (n - x + 1).lgamma()


def _geometric(x: Tensor, a: Arguments) -> Tensor:
    return _together(torch.ones_like(x), x)


def _negative_binomial(x: Tensor, a: Arguments) -> Tensor:
    return _together(x, a["total_count"].to(x))


def _negative_binomial_base(x: Tensor, a: Arguments) -> Tensor:
    r = a["total_count"].to(x)
    return (x + r).lgamma() - r.lgamma() - (x + 1).lgamma()


def _categorical(x: Tensor, a: Arguments) -> Tensor:
    size = a["probs"].shape[-1]
    out = a["probs"].new_zeros(*x.shape, size)
    return out.scatter_(-1, x.long().unsqueeze(-1), 1.0)


def _counts(x: Tensor, a: Arguments) -> Tensor:
    return x


def _multinomial_base(x: Tensor, a: Arguments) -> Tensor:
    return (x.sum(-1) + 1).lgamma() - (x + 1).lgamma().sum(-1)


_OF_GAMMA = (_gamma_normaliser, _gamma_expected)
_OF_SIMPLEX = (_simplex_normaliser, _simplex_expected, _less_sum)

KERNELS: Mapping[type, PriorKernel] = {
    kernel.distribution: kernel
    for kernel in (
        PriorKernel(
            dist.Gamma,
            "gamma",
            "positive",
            1.0,
            _gamma_chi,
            *_OF_GAMMA,
            _less_log,
            _gamma_at,
            _gamma_features,
        ),
        PriorKernel(
            dist.Exponential,
            "gamma",
            "positive",
            1.0,
            _exponential_chi,
            *_OF_GAMMA,
            _less_log,
            _gamma_at,
            _exponential_statistics,
        ),
        PriorKernel(
            dist.InverseGamma,
            "gamma",
            "positive",
            -1.0,
            _gamma_chi,
            *_OF_GAMMA,
            _log,
            _inverse_gamma_at,
            _inverse_gamma_features,
        ),
        PriorKernel(dist.Beta, "beta", "unit", 1.0, _beta_chi, *_OF_SIMPLEX, _beta_at, _features),
        PriorKernel(
            dist.Dirichlet,
            "dirichlet",
            "simplex",
            1.0,
            _dirichlet_chi,
            *_OF_SIMPLEX,
            _dirichlet_at,
            _features,
        ),
    )
}

_BY_COUNT = ("concentration",)

# By the kernel's kind, the child's class, its argument, and the power of g in it.
PAIRS: Mapping[tuple[str, type, str, float], Pair] = {
    ("gamma", dist.Poisson, "rate", 1.0): Pair("rate", _poisson, _poisson_base, (), True),
    ("gamma", dist.Exponential, "rate", 1.0): Pair(
        "rate", _exponential, _exponential_base, (), True
    ),
    ("gamma", dist.Gamma, "rate", 1.0): Pair(
        "rate", _gamma_rate, _gamma_rate_base, _BY_COUNT, True
    ),
    ("gamma", dist.InverseGamma, "rate", 1.0): Pair(
        "rate", _inverse_gamma_rate, _inverse_gamma_rate_base, _BY_COUNT, True
    ),
    ("gamma", dist.Normal, "scale", -0.5): Pair("scale", _half_square, _normal_base, (), True),
    ("gamma", dist.LogNormal, "scale", -0.5): Pair(
        "scale", _log_normal, _log_normal_base, (), True
    ),
    ("gamma", dist.Laplace, "scale", -1.0): Pair("scale", _deviation, _laplace_base, (), True),
    ("beta", dist.Bernoulli, "probs", 1.0): Pair("probs", _bernoulli, _no_base),
    ("beta", dist.Binomial, "probs", 1.0): Pair("probs", _binomial, _binomial_base),
    ("beta", dist.Geometric, "probs", 1.0): Pair("probs", _geometric, _no_base),
    ("beta", dist.NegativeBinomial, "probs", 1.0): Pair(
        "probs", _negative_binomial, _negative_binomial_base, ("total_count",)
    ),
    ("dirichlet", dist.Categorical, "probs", 1.0): Pair("probs", _categorical, _no_base),
    ("dirichlet", dist.OneHotCategorical, "probs", 1.0): Pair("probs", _counts, _no_base),
    ("dirichlet", dist.Multinomial, "probs", 1.0): Pair("probs", _counts, _multinomial_base),
}


def pair_of(kernel: PriorKernel, child: type, argument: str, power: float) -> Pair | None:
    """How a child that reads f λ^power of a latent is conjugate to it; None where it is not.

    Args:
        kernel: The latent's prior.
        child: The child's exact class.
        argument: The argument that reads the latent.
        power: The power of the latent in it.

    Example:
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
