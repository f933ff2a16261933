"""BetaBinomial and DirichletMultinomial: shares that vary, as densities that no concentration cancels.

    log p(x | α, β) = Σ_{j<x} log(α + j) + Σ_{j<n−x} log(β + j) − Σ_{j<n} log(α + β + j) + log C(n, x)

so that with how many data have successes, failures and trials above 0, 1, 2, … the expected log density
of a BetaBinomial is known at any concentrations: Newton's method finds them from these tables. Where
data vary no more than a Binomial's both run off together, towards its density. Those of a
DirichletMultinomial are found by gradient.

Source: Griffiths (1973), "Maximum likelihood estimation for the beta-binomial distribution", Biometrics
29, for the likelihood by numbers above.
"""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_em.families import saddle_point
from pyro_em.families.family import Arguments, Family, NaturalForm, Statistics
from pyro_em.families.overdispersed import numbers_above


def _no_statistics(x: Tensor, a: Arguments) -> Statistics:
    return {}


_COUNTED = 3  # successes, failures and trials


def _trials(x: Tensor, a: Arguments) -> Tensor:
    return torch.as_tensor(a["total_count"], device=x.device).to(x.dtype)


def _counted(x: Tensor, a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Successes, failures and trials. # (*batch) each"""
    x, n = torch.broadcast_tensors(x, _trials(x, a))
    return x, (n - x).clamp(min=0), n


def _beta_binomial_statistics(x: Tensor, a: Arguments) -> Statistics:
    counted = torch.stack(_counted(x, a), -1)
    levels = torch.arange(int(counted.max()) if x.numel() else 0, device=x.device)
    found = counted.unsqueeze(-2) > levels.unsqueeze(-1)
    return {"feature": found.to(torch.float64).flatten(-2)}


def _beta_binomial_sums(
    weights: Tensor, value: Tensor, a: Arguments, keep: tuple[bool, ...]
) -> Statistics:
    each = [numbers_above(weights, counts, keep) for counts in _counted(value, a)]
    levels = max(t.shape[-1] for t in each)
    each = [torch.nn.functional.pad(t, (0, levels - t.shape[-1])) for t in each]
    return {"feature": torch.stack(torch.broadcast_tensors(*each), -1).flatten(-2)}


def _above(a: Arguments, P: int) -> Tensor:
    """α, β and their sum, with the numbers that are counted added to each. # (*batch, P / 3, 3)"""
    one, zero = torch.broadcast_tensors(a["concentration1"], a["concentration0"])
    levels = torch.arange(P // _COUNTED, dtype=one.dtype, device=one.device)
    return torch.stack([one, zero, one + zero], -1).unsqueeze(-2) + levels.unsqueeze(-1)


def _beta_binomial_coefficients(a: Arguments, P: int) -> Tensor:
    found = _above(a, P).log()
    found[..., 2].neg_()
    return torch.nn.functional.pad(found.flatten(-2), (0, 1))


def _beta_binomial_derivatives(s: Statistics, a: Arguments) -> tuple[Tensor, Tensor]:
    inverse = _above(a, s["feature"].shape[-1]).reciprocal()
    weighed = s["feature"].unflatten(-1, (-1, _COUNTED)) * inverse
    first = weighed.sum(-2)
    second = -(weighed * inverse).sum(-2)
    own, both = second[..., :2], -second[..., 2:]
    return first[..., :2] - first[..., 2:], torch.diag_embed(own) + both.unsqueeze(-1)


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
        _beta_binomial_statistics,
        {},
        log_density=_beta_binomial_log_density,
        accumulate=_beta_binomial_sums,
        constants=("total_count",),
        natural=NaturalForm(
            ("concentration1", "concentration0"),
            _beta_binomial_coefficients,
            _beta_binomial_derivatives,
            of_counts=True,
            levels=_trials,
            per_level=_COUNTED,
            limit=(("concentration1", "concentration0"), "Binomial"),
        ),
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
