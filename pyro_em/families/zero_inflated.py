"""ZeroInflatedPoisson and ZeroInflatedNegativeBinomial: densities alone, which no shape makes cancel.

    log p(0) = log(g + (1 − g) p₀(0)),    log p(x) = log(1 − g) + log p₀(x) for x > 0

with the gate g and the density p₀ of the counts. Their updates are found by gradient. Where counts vary
no more than a Poisson's the shape rises without end, and with Pyro's own density, a difference of
logarithms of gamma functions, the evidence would be rounding soon.
"""

from __future__ import annotations

from collections.abc import Callable

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyro_em.families import overdispersed, rates
from pyro_em.families.family import Arguments, Family, Statistics

_FAR = -30.0  # nats, below which zeros of the counts are nothing beside those of the gate

Density = Callable[[Tensor, Arguments], Tensor]


def _no_statistics(x: Tensor, a: Arguments) -> Statistics:
    return {}


def _log_density(counts: Family) -> Density:
    of_counts = counts.log_density
    assert of_counts is not None

    def density(x: Tensor, a: Arguments) -> Tensor:
        if "gate" not in a:
            closed, opened = logsigmoid(a["gate_logits"]), logsigmoid(-a["gate_logits"])
            own = opened + of_counts(x, a)
            return torch.where(x == 0, torch.logaddexp(closed.expand_as(own), own), own)
        own = (-a["gate"]).log1p() + of_counts(x, a)
        return torch.where(x == 0, _with_gate(a["gate"], own), own)

    return density


def _with_gate(gate: Tensor, own: Tensor) -> Tensor:
    """log(g + p) of p = (1 − g) p₀(0) by its logarithm, with a derivative where g is zero."""
    is_near = own > _FAR
    near = torch.where(is_near, own, 0.0)
    is_open = gate > 0
    far = torch.where(is_open, torch.where(is_open & ~is_near, gate, 1.0).log(), -torch.inf)
    return torch.where(
        is_near, near + (gate * (-near).exp()).log1p(), torch.logaddexp(far, own.expand_as(far))
    )


def _family(distribution: type, counts: Family, *arguments: str) -> Family:
    return Family(
        distribution,
        _no_statistics,
        {},
        log_density=_log_density(counts),
        plain=(*arguments, "gate", "gate_logits"),
    )


def _counted(module_families: tuple[Family, ...], distribution: type) -> Family:
    return next(f for f in module_families if f.distribution is distribution)


FAMILIES = (
    _family(dist.ZeroInflatedPoisson, _counted(rates.FAMILIES, dist.Poisson), "rate"),
    _family(
        dist.ZeroInflatedNegativeBinomial,
        _counted(overdispersed.FAMILIES, dist.NegativeBinomial),
        "total_count",
        "probs",
        "logits",
    ),
)
