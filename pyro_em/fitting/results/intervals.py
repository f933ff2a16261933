"""Confidence intervals that stay within the constraint of a parameter.

    g(θ) ± q s g′(θ),    back by g⁻¹,    q = Φ⁻¹((1 + level) / 2)

with the standard error s and the delta method for g: the logarithm where a value has one bound, the
logit where it has two (a probability, an entry of a simplex, a correlation), the value itself where it
has none.

Source: Wasserman (2004), "All of Statistics", section 9.9, for the delta method.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em.distributions import bounds


def limits_of(constraint: constraints.Constraint, value: Tensor) -> tuple[Tensor, Tensor]:
    """Between what each element of a parameter may lie, infinite where it has no bound.

    Args:
        constraint: Of the parameter.
        value: The parameter.

    Returns:
        The lower and the upper limits. # both of the parameter's shape

    Example:
        >>> limits_of(constraints.positive, torch.ones(2))
        (tensor([0., 0.]), tensor([inf, inf]))
        >>> limits_of(constraints.positive_definite, torch.eye(2))[0]
        tensor([[0., -inf],
                [-inf, 0.]])
    """
    base = constraint
    while isinstance(base, constraints.independent):
        base = base.base_constraint
    lower = torch.full_like(value, -math.inf)
    upper = torch.full_like(value, math.inf)
    name = type(base).__name__.lstrip("_")
    found = bounds(constraint)
    if found is not None:
        return torch.full_like(value, found[0]), torch.full_like(value, found[1])
    if base is constraints.simplex:
        return torch.zeros_like(value), torch.ones_like(value)
    if name.startswith("Corr"):
        return -torch.ones_like(value), torch.ones_like(value)
    if name.endswith("PositiveDefinite") or name in ("LowerCholesky", "SoftplusLowerCholesky"):
        diagonal = torch.eye(value.shape[-1], dtype=torch.bool, device=value.device)
        lower = lower.masked_fill(diagonal, 0.0)
    elif name == "PositiveOrderedVector":
        lower = torch.zeros_like(value)
    return lower, upper


def interval(
    estimate: Tensor, error: Tensor, lower: Tensor, upper: Tensor, level: float
) -> tuple[Tensor, Tensor]:
    """The ends of the interval of each element.

    Args:
        estimate: The value.
        error: Its standard error; nan gives nan.
        lower: Its lower limit, or −inf.
        upper: Its upper limit, or inf.
        level: The probability that the interval holds.

    Returns:
        Lower and upper ends. # both of the parameter's shape

    Example:
        >>> half, none = torch.tensor(0.5), torch.tensor(math.inf)
        >>> [round(float(end), 4) for end in interval(half, half, -none, none, 0.95)]
        [-0.48, 1.48]
        >>> [round(float(end), 4) for end in interval(half, half / 2, 0 * half, none, 0.95)]
        [0.1877, 1.3322]
        >>> [round(float(end), 4) for end in interval(half, half / 2, 0 * half, 2 * half, 0.95)]
        [0.1235, 0.8765]
    """
    estimate, error = estimate.double(), error.double()
    lower, upper = lower.double(), upper.double()
    q = NormalDist().inv_cdf((1 + level) / 2)
    plain = estimate - q * error, estimate + q * error
    above, below = estimate - lower, upper - estimate
    with_lower = (lower + above * torch.exp(s * q * error / above) for s in (-1, 1))
    with_upper = (upper - below * torch.exp(-s * q * error / below) for s in (-1, 1))
    width = upper - lower
    slope = width / (above * below)
    logit = torch.log(above) - torch.log(below)
    with_both = (lower + width * torch.sigmoid(logit + s * q * error * slope) for s in (-1, 1))
    has_lower, has_upper = torch.isfinite(lower), torch.isfinite(upper)
    ends = []
    for none, low, high, both in zip(plain, with_lower, with_upper, with_both, strict=True):
        one = torch.where(has_lower, low, torch.where(has_upper, high, none))
        ends.append(torch.where(has_lower & has_upper, both, one))
    return ends[0], ends[1]


def scale_in_words(lower: Tensor, upper: Tensor) -> str:
    """On which scales the intervals of some values are made."""
    low, high = torch.isfinite(lower), torch.isfinite(upper)
    kinds = {
        "logit": bool((low & high).any()),
        "logarithm": bool((low ^ high).any()),
        "value": bool((~low & ~high).any()),
    }
    return " and ".join(kind for kind, there in kinds.items() if there)
