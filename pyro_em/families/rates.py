"""Poisson and Exponential: one functional form, n log a − d a, seen from two sides.

Poisson      log p(x | a) = x log a − a − log x!        x events in one unit of exposure
Exponential  log p(x | a) = log a − a x                 one event in x units of exposure
"""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_em.families import saddle_point
from pyro_em.families.family import Arguments, Family, Rule, Statistics
from pyro_em.families.forms import Kind


def _rate(stats: Statistics, arguments: Arguments) -> tuple[Tensor, Tensor]:
    return stats["event"], stats["exposure"]


def _poisson_log_density(value: Tensor, arguments: Arguments) -> Tensor:
    rate = arguments["rate"]
    if saddle_point.is_large(value):
        return saddle_point.poisson(value, rate)
    positive = rate > 0
    log_rate = torch.where(positive, torch.where(positive, rate, 1.0).log(), -torch.inf)
    return torch.where(value == 0, 0.0, value * log_rate) - rate - (value + 1).lgamma()


FAMILIES = (
    Family(
        dist.Poisson,
        lambda x, a: {"event": x, "exposure": torch.ones_like(x)},
        {"rate": Rule(Kind.RATE, _rate)},
        log_density=_poisson_log_density,
    ),
    Family(
        dist.Exponential,
        lambda x, a: {"event": torch.ones_like(x), "exposure": x},
        {"rate": Rule(Kind.RATE, _rate)},
    ),
)
