"""Log densities of large counts and shapes, as sums of terms none of which is large.

A textbook's formula subtracts logarithms of gamma functions that are as large as the counts or shapes
themselves: at 10⁹ they are rounded by 10⁻⁶ nats, which is more than a step of EM gains. Written about
their largest value, with

    D(a, m) = a log(m / a) − m + a ≤ 0            how far the mean m is from a
    E(a)    = a log a − a − log Γ(a)               half a logarithm, by Stirling's series

the same densities are

    Poisson      D(x, λ) + C(x),                   C(x) = E(x) − log x, and 0 where x = 0
    Multinomial  Σ_i (D(x_i, n p_i) + C(x_i)) − C(n)
    Gamma        D(α, β x) + E(α) − log x
    Dirichlet    Σ_i (D(α_i, n x_i) + E(α_i) − log x_i) − E(n),   n = Σ_i α_i

Source: Loader (2000), "Fast and accurate computation of binomial probabilities".
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LARGE = 2.0**18
"""Counts and shapes from which on a difference of their logarithms of gamma functions is avoided."""

_SERIES = 16.0  # from which on Stirling's series has all digits


def is_large(t: Tensor) -> bool:
    """Whether a number is so large that densities are to be taken about their largest value."""
    return bool(t.numel()) and float(t.detach().amax()) > LARGE


def away(a: Tensor, m: Tensor) -> Tensor:
    """D(a, m) = a log(m / a) − m + a, which is −m where a = 0 and −∞ where only m = 0.

    Example:
        >>> a = torch.tensor([0.0, 1e9], dtype=torch.float64)
        >>> away(a, a + torch.tensor([2.0, 1e4])).round(decimals=4)
        tensor([-2.0000, -0.0500], dtype=torch.float64)
    """
    a, m = a.to(torch.float64), m.to(torch.float64)
    known = (a > 0) & (m > 0)
    top, mean = torch.where(known, a, 1.0), torch.where(known, m, 1.0)
    v = (mean - top) / top
    near = v.abs() < 0.5
    log = torch.where(near, torch.where(near, v, 0.0).log1p(), mean.log() - top.log())
    return torch.where(known, top * (log - v), torch.where(a > 0, -torch.inf, -m))


def excess(a: Tensor) -> Tensor:
    """E(a) = a log a − a − log Γ(a), for a > 0.

    Example:
        >>> excess(torch.tensor([1.0, 1e12], dtype=torch.float64))
        tensor([-1.0000, 12.8966], dtype=torch.float64)
    """
    a = a.to(torch.float64)
    few, many = a.clamp(max=_SERIES), a.clamp(min=_SERIES)
    inverse = many.reciprocal()
    square = inverse * inverse
    rest = inverse * (1 / 12 - square * (1 / 360 - square * (1 / 1260 - square / 1680)))
    series = 0.5 * (many.log() - math.log(2 * math.pi)) - rest
    return torch.where(a < _SERIES, few * few.log() - few - few.lgamma(), series)


def of_count(x: Tensor) -> Tensor:
    """C(x) = x log x − x − log x!, which is zero where x is."""
    x = x.to(torch.float64)
    positive = torch.where(x > 0, x, 1.0)
    return torch.where(x > 0, excess(positive) - positive.log(), 0.0)


def poisson(x: Tensor, rate: Tensor) -> Tensor:
    """log p(x | λ) in nats."""
    return away(x, rate) + of_count(x)


def successes(x: Tensor, n: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """log p(x | n, p) of a Binomial in nats, with q = 1 − p."""
    lost = n - x
    choices = of_count(x) + of_count(lost) - of_count(n)
    return away(x, n * p) + away(lost, n * q) + choices


def multinomial(x: Tensor, p: Tensor) -> Tensor:
    """log p(x | p) in nats, of the total that x has. # of the last dimension"""
    n = x.sum(-1, keepdim=True)
    return (away(x, n * p) + of_count(x)).sum(-1) - of_count(n.squeeze(-1))


def failures(x: Tensor, r: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """log p(x | r, p) of a NegativeBinomial in nats, with q = 1 − p."""
    n = x + r
    return away(x, n * p) + away(r, n * q) + of_count(x) + excess(r) - excess(n)


def gamma(x: Tensor, shape: Tensor, rate: Tensor) -> Tensor:
    """log p(x | α, β) in nats, for x > 0."""
    return away(shape, rate * x) + excess(shape) - x.log()


def dirichlet(x: Tensor, alpha: Tensor) -> Tensor:
    """log p(x | α) in nats, for x inside. # of the last dimension"""
    n = alpha.sum(-1)
    off = n * (x.to(torch.float64).sum(-1) - 1)  # of data that add up to one but roughly
    own = away(alpha, n.unsqueeze(-1) * x) + excess(alpha) - x.log()
    return own.sum(-1) - excess(n) + off


def dirichlet_multinomial(x: Tensor, alpha: Tensor) -> Tensor:
    """log p(x | α) in nats, of the total that x has; a BetaBinomial is one with two categories.

    With z = x + α, the totals n, m and s of x, α and z, and the mean z / s of both,

        Σ_i (D(x_i, n z_i / s) + D(α_i, m z_i / s) + C(x_i) + E(α_i) − E(z_i)) − C(n) − E(m) + E(s)

    so that concentrations that run off to those of a Multinomial cancel nowhere.

    Args:
        x: Counts. # (…, categories)
        alpha: Concentrations. # (…, categories)

    Example:
        >>> dirichlet_multinomial(torch.tensor([2.0, 1.0]), torch.tensor([1.0, 1.0]))
        tensor(-1.3863, dtype=torch.float64)
    """
    x, alpha = x.to(torch.float64), alpha.to(torch.float64)
    z = x + alpha
    n, m = x.sum(-1), alpha.sum(-1)
    s = n + m
    share = z / s.unsqueeze(-1)
    own = away(x, n.unsqueeze(-1) * share) + away(alpha, m.unsqueeze(-1) * share)
    own = own + of_count(x) + excess(alpha) - excess(z)
    return own.sum(-1) - of_count(n) - excess(m) + excess(s)
