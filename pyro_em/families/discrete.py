"""Categorical, OneHotCategorical, Multinomial, Bernoulli, Binomial, Geometric.

    log p(x | a) = Σ_k x_k log a_k + const            a row of probabilities a, one-hot or counted x
    log p(x | a) = x log a + (m − x) log(1 − a) + const       a probability a, x successes among m

An exact zero in ``probs`` has log-density −inf here, where Pyro clamps it to log(eps): structural
zeros stay zero through EM. In products with counts, 0 · −inf counts as 0.
"""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_em.families import saddle_point
from pyro_em.families.family import LOG_SIMPLEX, LOGIT, Arguments, Family, Rule, Statistics
from pyro_em.families.forms import Kind


def _log_probs(arguments: Arguments) -> Tensor:
    if "logits" in arguments:
        return torch.log_softmax(arguments["logits"], -1)
    probs = arguments["probs"]
    return log_or_minus_infinity(probs)


def log_or_minus_infinity(p: Tensor) -> Tensor:
    """log p with log 0 = −inf and a zero gradient there."""
    positive = p > 0
    if not torch.is_grad_enabled():
        return torch.where(positive, p, 0.0).log()
    return torch.where(positive, torch.where(positive, p, 1.0).log(), -torch.inf)


def _multiply(count: Tensor, log_p: Tensor) -> Tensor:
    """count · log p with 0 · −inf = 0."""
    return torch.where(count == 0, 0.0, count * log_p)


def _categorical_log_density(value: Tensor, arguments: Arguments) -> Tensor:
    log_p = _log_probs(arguments)
    index = value if value.dtype is torch.int64 else value.long()
    if log_p.numel() == log_p.shape[-1] and index.dim() >= log_p.dim() - 1:  # one for all
        return log_p.reshape(-1).index_select(0, index.reshape(-1)).reshape(index.shape)
    batch = torch.broadcast_shapes(index.shape, log_p.shape[:-1])
    index = index.expand(batch).unsqueeze(-1)
    return log_p.expand(*batch, log_p.shape[-1]).gather(-1, index).squeeze(-1)


def _one_hot_log_density(value: Tensor, arguments: Arguments) -> Tensor:
    return _multiply(value, _log_probs(arguments)).sum(-1)


def _multinomial_log_density(value: Tensor, arguments: Arguments) -> Tensor:
    if saddle_point.is_large(value):
        return saddle_point.multinomial(value, _log_probs(arguments).exp())
    coefficient = (value.sum(-1) + 1).lgamma() - (value + 1).lgamma().sum(-1)
    return coefficient + _multiply(value, _log_probs(arguments)).sum(-1)


def _log_odds(arguments: Arguments) -> tuple[Tensor, Tensor]:
    """log p and log(1 − p)."""
    if "logits" in arguments:
        logits = arguments["logits"]
        return torch.nn.functional.logsigmoid(logits), torch.nn.functional.logsigmoid(-logits)
    p = arguments["probs"]
    return log_or_minus_infinity(p), log_or_minus_infinity(1 - p)


def _bernoulli_log_density(value: Tensor, arguments: Arguments) -> Tensor:
    log_p, log_q = _log_odds(arguments)
    return _multiply(value, log_p) + _multiply(1 - value, log_q)


def _binomial_log_density(value: Tensor, arguments: Arguments) -> Tensor:
    log_p, log_q = _log_odds(arguments)
    n = arguments["total_count"]
    if saddle_point.is_large(n):
        inside = (value >= 0) & (value <= n)
        x = torch.where(inside, value, 0)
        return torch.where(
            inside, saddle_point.successes(x, n, log_p.exp(), log_q.exp()), -torch.inf
        )
    coefficient = (n + 1).lgamma() - (value + 1).lgamma() - (n - value + 1).lgamma()
    density = coefficient + _multiply(value, log_p) + _multiply(n - value, log_q)
    return torch.where((value < 0) | (value > n), -torch.inf, density)


def _geometric_log_density(value: Tensor, arguments: Arguments) -> Tensor:
    log_p, log_q = _log_odds(arguments)
    return log_p + _multiply(value, log_q)


def _counts_of_index(value: Tensor, arguments: Arguments) -> Statistics:
    log_p = _log_probs(arguments)
    counts = log_p.new_zeros(*value.shape, log_p.shape[-1])
    return {"count": counts.scatter_(-1, value.long().unsqueeze(-1), 1.0)}


def _counts(value: Tensor, arguments: Arguments) -> Statistics:
    return {"count": value}


def _simplex(stats: Statistics, arguments: Arguments) -> tuple[Tensor, Tensor]:
    return stats["count"], stats["count"].sum(-1, keepdim=True)


def _successes(stats: Statistics, arguments: Arguments) -> tuple[Tensor, Tensor]:
    return stats["success"], stats["trial"]


SIMPLEX = {
    "probs": Rule(Kind.SIMPLEX, _simplex),
    "logits": Rule(Kind.SIMPLEX, _simplex, LOG_SIMPLEX),
}


PROBABILITY = {
    "probs": Rule(Kind.PROBABILITY, _successes),
    "logits": Rule(Kind.PROBABILITY, _successes, LOGIT),
}


FAMILIES = (
    Family(dist.Categorical, _counts_of_index, SIMPLEX, log_density=_categorical_log_density),
    Family(dist.OneHotCategorical, _counts, SIMPLEX, log_density=_one_hot_log_density, event_dim=1),
    Family(
        dist.Multinomial,
        _counts,
        SIMPLEX,
        log_density=_multinomial_log_density,
        constants=("total_count",),
        event_dim=1,
    ),
    Family(
        dist.Bernoulli,
        lambda x, a: {"success": x, "trial": torch.ones_like(x)},
        PROBABILITY,
        log_density=_bernoulli_log_density,
    ),
    Family(
        dist.Binomial,
        lambda x, a: {
            "success": x,
            "trial": a["total_count"].expand(
                torch.broadcast_shapes(a["total_count"].shape, x.shape)
            ),
        },
        PROBABILITY,
        log_density=_binomial_log_density,
        constants=("total_count",),
    ),
    Family(
        dist.Geometric,
        lambda x, a: {"success": torch.ones_like(x), "trial": 1 + x},
        PROBABILITY,
        log_density=_geometric_log_density,
    ),
)
