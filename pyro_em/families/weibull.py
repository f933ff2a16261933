"""Weibull: sums about the shape of the E-step, which tell all shapes near it.

    log p(x | λ, k) = log k + t − exp t − log x,      t = k log(x / λ)

With t at the arguments of the E-step, k₀ and λ₀, and k = (1 + ε) k₀,

    (x / λ₀)^k = exp(t (1 + ε)) = exp(t) Σ_j (ε t)^j / j!

so that sums of exp(t) t^j / j! up to some j say what the sum of x^k is for every k nearby, to rounding:
the data are gone through once, not once for each shape that a search tries. In (k, k log λ) the density
is log-concave; given k the scale has a closed form, and Newton's method finds the shape. How far sums
reach, the last of them tells: further on they are taken anew.

Source: Lawless (2003), "Statistical Models and Methods for Lifetime Data", section 5.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_em.families.family import Arguments, Family, NaturalForm, Statistics, weigh

LAST = 16
"""The power of the last sum: even, so that all of its terms are positive."""

_TOLD = 1e-13  # of a sum: what the last of its terms may be

FARTHEST = 600.0
"""Of t: further out exp t and its powers overflow, and such a datum has no density."""

_STEPS = 50

_SETTLED = 1e-13  # a relative step after which the next is lost in rounding


@dataclass(frozen=True)
class ScaledPowers(NaturalForm):
    """What sums say of scale and shape: Σ log(x / λ₀) and Σ exp(t) t^j / j!, about the references."""

    def terms(self, statistics: Statistics, arguments: Arguments) -> Tensor:
        """See `NaturalForm.terms`."""
        k, w = arguments["concentration"], statistics["weight"]
        away, _, (total, *_) = _at(statistics, arguments)
        logs = statistics["feature"][..., 0]
        parts = torch.broadcast_tensors(w * k.log(), k * logs, -w * k * away, -total)
        return torch.where(w.unsqueeze(-1) == 0, 0.0, torch.stack(parts, -1))


def _powers(feature: Tensor, e: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Σ_j ε^j M_j with its first and second derivative in ε."""
    zeroth = first = second = torch.zeros_like(e * feature[..., 0])
    for moment in reversed(feature[..., 1:].unbind(-1)):
        second = second * e + 2 * first
        first = first * e + zeroth
        zeroth = zeroth * e + moment
    return zeroth, first, second


def _ratio(s: Statistics, a: Arguments) -> Tensor:
    """ε."""
    return a["concentration"] / s["reference:concentration"] - 1


def _at(s: Statistics, a: Arguments) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
    """log λ − log λ₀, (λ₀ / λ)^k, and Σ (x / λ)^k with its derivatives in k where λ is λ₀."""
    away = a["scale"].log() - s["reference:scale"].log()
    factor = (-a["concentration"] * away).exp()
    found = _powers(s["feature"], _ratio(s, a))
    unit = s["reference:concentration"]
    total, first, second = found[0], found[1] / unit, found[2] / unit**2
    return away, factor, (factor * total, factor * first, factor * second)


def _derivatives(s: Statistics, a: Arguments) -> tuple[Tensor, Tensor]:
    scale, k, w = a["scale"], a["concentration"], s["weight"]
    away, _, (total, first, second) = _at(s, a)
    in_k = first - away * total
    in_both = second - 2 * away * first + away**2 * total
    of_scale = k / scale * (total - w)
    of_shape = w / k + s["feature"][..., 0] - w * away - in_k
    mixed = (total - w + k * in_k) / scale
    rows = (k / scale**2 * (w - (1 + k) * total), mixed, mixed, -w / k**2 - in_both)
    slope = torch.stack(torch.broadcast_tensors(of_scale, of_shape), -1)
    return slope, torch.stack(torch.broadcast_tensors(*rows), -1).unflatten(-1, (2, 2))


def _reaches(s: Statistics, a: Arguments) -> Tensor:
    """Whether the last sum still adds next to nothing. # (*cells)"""
    e = _ratio(s, a)
    total = _powers(s["feature"], e)[0]
    last = e.abs() ** LAST * s["feature"][..., -1]
    return (s["weight"] <= 0) | ((total > 0) & (last <= _TOLD * total))


def _maximum(s: Statistics, a: Arguments) -> Tensor | None:
    """Scale and shape, by Newton's method on the profile of the shape. # (*cells, 2)"""
    unit, w = s["reference:concentration"], s["weight"]
    k = unit
    for _ in range(_STEPS):
        total, first, second = _powers(s["feature"], k / unit - 1)
        mean, bend = first / (unit * total), second / (unit**2 * total)
        slope = w / k + s["feature"][..., 0] - w * mean
        curved = -w / k**2 - w * (bend - mean**2)
        step = -slope / curved
        k = torch.maximum(k + step, k / 4)
        if not bool(_reaches(s, {"concentration": k}).all()):
            return None
        if float((step / k).abs().amax()) <= _SETTLED:
            break
    else:
        return None
    scale = s["reference:scale"] * ((_powers(s["feature"], k / unit - 1)[0] / w).log() / k).exp()
    return torch.stack(torch.broadcast_tensors(scale, k), -1)


def _exponent(x: Tensor, a: Arguments) -> Tensor:
    """t."""
    return a["concentration"] * (x.log() - a["scale"].log())


def _parts(x: Tensor, a: Arguments) -> tuple[Tensor, list[Tensor]]:
    """log(x / λ), and exp(t) t^j / j!."""
    t = _exponent(x, a)
    near = t.clamp(-FARTHEST, FARTHEST)
    found = [near.exp()]
    for j in range(1, LAST + 1):
        found.append(found[-1] * near / j)
    return t / a["concentration"], found


def _statistics(x: Tensor, a: Arguments) -> Statistics:
    logs, powers = _parts(x, a)
    return {"feature": torch.stack([logs, *powers], -1)}


def _accumulate(weights: Tensor, value: Tensor, a: Arguments, keep: tuple[bool, ...]) -> Statistics:
    """Sums of T(x), one power after the other: no table has all of them."""
    t = _exponent(value, a)
    near = t.clamp(-FARTHEST, FARTHEST)
    sums = [weigh(weights, t / a["concentration"], keep)]
    own = near.exp()
    for j in range(LAST + 1):
        own = own * near / j if j else own
        sums.append(weigh(weights, own, keep))
    return {"feature": torch.stack(torch.broadcast_tensors(*sums), -1)}


def _log_density(x: Tensor, a: Arguments) -> Tensor:
    t = _exponent(x, a)
    return a["concentration"].log() + t - t.exp() - x.log()


FAMILIES = (
    Family(
        dist.Weibull,
        _statistics,
        {},
        log_density=_log_density,
        accumulate=_accumulate,
        natural=ScaledPowers(
            ("scale", "concentration"),
            derivatives=_derivatives,
            references=("scale", "concentration"),
            maximum=_maximum,
            reaches=_reaches,
            spread=("concentration", ""),
        ),
    ),
)
