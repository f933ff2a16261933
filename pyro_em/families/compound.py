"""BetaBinomial and DirichletMultinomial: densities alone, which no concentration makes cancel.

Their updates are found by gradient. Where data vary no more than a Binomial or a Multinomial the
concentrations rise without end, and with Pyro's own density the evidence would be rounding soon.
"""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_em.families import saddle_point
from pyro_em.families.family import Arguments, Family, Statistics


def _no_statistics(x: Tensor, a: Arguments) -> Statistics:
    return {}


def _beta_binomial_log_density(x: Tensor, a: Arguments) -> Tensor:
    n = torch.as_tensor(a["total_count"], dtype=torch.float64, device=x.device)
    inside = (x >= 0) & (x <= n)
    won = torch.where(inside, x, 0)
    counts = torch.stack(torch.broadcast_tensors(won, n - won), -1)
    alpha = torch.stack(torch.broadcast_tensors(a["concentration1"], a["concentration0"]), -1)
    return torch.where(inside, saddle_point.dirichlet_multinomial(counts, alpha), -torch.inf)


def _dirichlet_multinomial_log_density(x: Tensor, a: Arguments) -> Tensor:
    return saddle_point.dirichlet_multinomial(x, a["concentration"])


FAMILIES = (
    Family(
        dist.BetaBinomial,
        _no_statistics,
        {},
        log_density=_beta_binomial_log_density,
        constants=("total_count",),
        plain=("concentration1", "concentration0"),
    ),
    Family(
        dist.DirichletMultinomial,
        _no_statistics,
        {},
        log_density=_dirichlet_multinomial_log_density,
        constants=("total_count",),
        plain=("concentration",),
        event_dim=1,
        event_dims={"concentration": 1},
    ),
)
