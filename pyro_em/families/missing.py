r"""MultivariateNormal with missing coordinates: the statistics of the complete data, as expected.

The M-step is that of complete data, from what the coordinates that are seen say of the others:

    Σ w E[d | x_o],      Σ w (E[d | x_o] E[d | x_o]ᵀ + Cov[x | x_o]),      d = x − loc,

both at the arguments of the E-step.

Source: Little and Rubin (2002), section 11.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_em.families.family import Arguments, Family, Rule, Statistics
from pyro_em.families.forms import Kind
from pyro_em.families.normal import SPREADS, mean_vector, scatter
from pyro_em.incomplete import (
    IncompleteMultivariateNormal,
    expected_covariance,
    expected_deviation,
    marginal_log_density,
)


def _expected_scatter(
    weights: Tensor, value: Tensor, arguments: Arguments, keep: tuple[bool, ...]
) -> Statistics:
    wide = weights.to(torch.float64)
    sums = scatter(wide, expected_deviation(value, arguments), keep)
    sums["square"] = sums["square"] + expected_covariance(wide, value, arguments, keep)
    return {name: t.to(weights.dtype) for name, t in sums.items()}


def _magnitude(value: Tensor) -> Tensor:
    return value.abs().nan_to_num(0.0)


FAMILIES = (
    Family(
        IncompleteMultivariateNormal,
        lambda x, a: {"deviation": expected_deviation(x, a)},
        {"loc": Rule(Kind.MEAN_VECTOR, mean_vector), **SPREADS},
        log_density=marginal_log_density,
        accumulate=_expected_scatter,
        event_dim=1,
        magnitude=_magnitude,
    ),
)
