"""NegativeBinomial and GammaPoisson: counts whose rates vary, in one linear form.

    Γ(x + r) / Γ(r) = r (r + 1) … (r + x − 1)

so that with T_j(x) = 1 where x > j and else 0, for j = 0, 1, … below the largest count,

    log p(x | r, p) = Σ_j T_j(x) (log(r + j) + log p) + r log(1 − p) − log x!

is linear in T: sums say how many counts are above each number, and no gamma function of the data is
taken, which would cancel where r is large. A GammaPoisson with concentration α and rate β has r = α
and p = 1 / (1 + β).

Source: Anscombe (1950), "Sampling theory of the negative binomial and logarithmic series
distributions", Biometrika 37, for the likelihood by numbers above.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyro_em.families import saddle_point
from pyro_em.families.family import Arguments, Family, NaturalForm, Statistics
from pyro_em.families.predicted import (
    GAMMA_POISSON,
    NEGATIVE_BINOMIAL,
    PredictedForm,
    log_rising,
)

MANY = 2**14
"""Counts above this one are no table."""


def histogram(weights: Tensor, index: Tensor, levels: int) -> Tensor:
    """Σ w of the data at each level. # (columns, levels)

    Args:
        weights: # (rows, columns)
        index: The level of each row. # (rows,)
        levels: How many there are.
    """
    total = weights.new_zeros(levels, weights.shape[1])
    return total.index_add_(0, index, weights).T


def above(counts: Tensor) -> Tensor:
    """How many data are above 0, 1, 2, … from how many are at 0, 1, 2, … # (…, levels − 1)"""
    return counts.flip(-1).cumsum(-1).flip(-1)[..., 1:]


def _statistics(x: Tensor, a: Arguments) -> Statistics:
    levels = torch.arange(int(x.max()) if x.numel() else 0, device=x.device)
    return {"feature": (x.unsqueeze(-1) > levels).to(torch.float64)}


def numbers_above(weights: Tensor, value: Tensor, keep: tuple[bool, ...]) -> Tensor:
    """How many data are above 0, 1, 2, …, by a histogram of each number of an event.

    Args:
        weights: Expected counts. # (*batch)
        value: # (*batch or 1s)
        keep: For each batch dimension, whether the result keeps it.

    Returns:
        # (*batch with 1 where summed, the largest count)
    """
    levels = int(value.max()) + 1 if value.numel() else 1
    sizes = [max(w, x) for w, x in zip(weights.shape, value.shape, strict=True)]
    columns = [i for i, kept in enumerate(keep) if kept and value.shape[i] == 1]
    apart = [i for i, kept in enumerate(keep) if kept and value.shape[i] > 1]
    rows = [i for i, kept in enumerate(keep) if not kept]
    order = [*apart, *rows, *columns]
    inner = [sizes[i] for i in rows]
    w, x = weights.permute(order), value.permute(order).long()
    totals, places = [], [*apart, *columns]
    for place in product(*(range(sizes[i]) for i in apart)):
        own_w = w[tuple(j if w.shape[i] > 1 else 0 for i, j in enumerate(place))]
        own_x = x[place].reshape(x.shape[len(apart) : len(apart) + len(rows)]).expand(inner)
        own_w = own_w.expand(*inner, *own_w.shape[len(rows) :]).reshape(own_x.numel(), -1)
        totals.append(histogram(own_w, own_x.reshape(-1), levels))
    found = torch.stack(totals).reshape(*(sizes[i] for i in places), levels)
    found = found.permute(*sorted(range(len(places)), key=places.__getitem__), -1)
    out = [size if kept else 1 for size, kept in zip(sizes, keep, strict=True)]
    return above(found).reshape(*out, levels - 1)


def _accumulate(weights: Tensor, value: Tensor, a: Arguments, keep: tuple[bool, ...]) -> Statistics:
    return {"feature": numbers_above(weights, value, keep)}


def _coefficients(shape: Tensor, log_p: Tensor, log_q: Tensor, P: int) -> Tensor:
    levels = torch.arange(P, dtype=shape.dtype, device=shape.device)
    ahead = (shape.unsqueeze(-1) + levels).log() + log_p.unsqueeze(-1)
    batch = torch.broadcast_shapes(shape.shape, log_p.shape)
    constant = (shape * log_q).expand(batch).unsqueeze(-1)
    return torch.cat([ahead.expand(*batch, P), constant], -1)


def _log_odds(a: Arguments) -> tuple[Tensor, Tensor]:
    """log p and log(1 − p)."""
    if "logits" in a:
        return logsigmoid(a["logits"]), logsigmoid(-a["logits"])
    if "probs" in a:
        return a["probs"].log(), (-a["probs"]).log1p()
    rate = a["rate"]
    return -rate.log1p(), -rate.reciprocal().log1p()


def _of(name: str) -> Callable[[Arguments, int], Tensor]:
    return lambda a, P: _coefficients(a[name], *_log_odds(a), P)


def _derivatives(s: Statistics, a: Arguments, name: str) -> tuple[Tensor, Tensor]:
    shape, w, tails = a[name], s["weight"], s["feature"]
    levels = torch.arange(tails.shape[-1], dtype=shape.dtype, device=shape.device)
    inverse = (shape.unsqueeze(-1) + levels).reciprocal()
    weighed = tails * inverse
    total, log_q = tails.sum(-1), _log_odds(a)[1]
    first = weighed.sum(-1) + w * log_q
    second = -(weighed * inverse).sum(-1)
    if "logits" in a:
        p, q = a["logits"].sigmoid(), (-a["logits"]).sigmoid()
        slope, mixed, curved = total * q - w * shape * p, -w * p, -(total + w * shape) * p * q
    elif "probs" in a:
        p, q = a["probs"], 1 - a["probs"]
        slope = total / p - w * shape / q
        mixed, curved = -w / q, -total / p**2 - w * shape / q**2
    else:
        rate = a["rate"]
        odds = rate * (1 + rate)
        slope = w * shape / odds - total / (1 + rate)
        mixed = w / odds
        curved = total / (1 + rate) ** 2 - w * shape * (1 + 2 * rate) / odds**2
    rows = torch.stack(torch.broadcast_tensors(second, mixed, mixed, curved), -1)
    return torch.stack(torch.broadcast_tensors(first, slope), -1), rows.unflatten(-1, (2, 2))


def _base(x: Tensor) -> Tensor:
    return -(x + 1).lgamma()


def _log_density(name: str) -> Callable[[Tensor, Arguments], Tensor]:
    def density(x: Tensor, a: Arguments) -> Tensor:
        log_p, log_q = _log_odds(a)
        if saddle_point.is_large(x):
            return saddle_point.failures(x, a[name], log_p.exp(), log_q.exp())
        events = torch.where(x == 0, 0.0, x * log_p)
        return log_rising(a[name], x) + events + a[name] * log_q + _base(x)

    return density


def _family(distribution: type, predicted: PredictedForm, shape: str, *others: str) -> Family:
    return Family(
        distribution,
        _statistics,
        {},
        log_density=_log_density(shape),
        accumulate=_accumulate,
        natural=NaturalForm(
            (shape, *others),
            _of(shape),
            lambda s, a: _derivatives(s, a, shape),
            of_counts=True,
            base=_base,
            limit=((shape,), "Poisson"),
        ),
        predicted=predicted,
    )


FAMILIES = (
    _family(dist.NegativeBinomial, NEGATIVE_BINOMIAL, "total_count", "probs", "logits"),
    _family(dist.GammaPoisson, GAMMA_POISSON, "concentration", "rate"),
)
