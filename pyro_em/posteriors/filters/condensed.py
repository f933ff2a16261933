"""Many numbers observed at a step, condensed to as many as a state has.

With H/s = Q R, the numbers Qᵀ(y/s) = R x + e say of x all that y says; what is left is noise alone.

Source: Jungbacker and Koopman (2015), "Likelihood-based dynamic factor analysis for measurement and
forecasting", Econometrics Journal 18.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from pyro_em.posteriors.filters.state_space import StateSpace

_LOG_TWO_PI = math.log(2 * math.pi)


def condensed(space: StateSpace) -> tuple[StateSpace, Tensor | None]:
    """The same chains with n numbers at each step, where there are many and many steps share a loading.

    Args:
        space: The chains.

    Returns:
        Chains with the same posterior, and what their evidence lacks, in nats, of each step
        # (chains, T); None if they are the same chains.

    Example:
        >>> one, which = torch.ones(1, 1, 1, 1).double(), torch.zeros(8, dtype=torch.long)
        >>> loading, value = torch.ones(1, 1, 3, 1).double(), torch.ones(1, 8, 3).double()
        >>> space = StateSpace(
        ...     one, 0 * value[..., :1], one, which, loading, loading[..., 0], which, value
        ... )
        >>> condensed(space)[0].value.shape
        torch.Size([1, 8, 1])
    """
    if stays_wide(space.loading.shape[-1], space.loading.shape[-2]):
        return space, None
    n = space.loading.shape[-1]
    by_pattern = _by_pattern(space)
    if by_pattern is None or 4 * by_pattern.loading.shape[1] > space.steps:
        return space, None
    whole = by_pattern.seen
    s = by_pattern.deviation
    Q, R = torch.linalg.qr(by_pattern.loading / s.unsqueeze(-1))
    counted = torch.isfinite(s).to(s)
    sizes = -(torch.where(counted > 0, s, 1.0).log() + 0.5 * _LOG_TWO_PI * counted).sum(-1)
    value = space.value.new_empty(*space.value.shape[:2], n)
    nats = torch.empty_like(value[..., 0])
    for v in range(R.shape[1]):
        here = (by_pattern.measurement == v).nonzero().squeeze(-1)
        scaled = by_pattern.value[:, here] / s[:, v].unsqueeze(1)
        told = scaled @ Q[:, v]
        rest = scaled - told @ Q[:, v].mT
        value[:, here] = told
        nats[:, here] = sizes[:, v, None] - 0.5 * rest.square().sum(-1) + 0.5 * n * _LOG_TWO_PI
    if whole is not None:
        nats = torch.where(whole[..., 0], nats, 0.0)
        whole = whole[..., :n]
    ones = torch.ones_like(R[..., 0])
    return replace(by_pattern, loading=R, deviation=ones, value=value, seen=whole), nats


def stays_wide(n: int, D: int) -> bool:
    """Whether so many numbers observed at a step are not worth the time, with a state of n."""
    return 2 * n >= D


def _by_pattern(space: StateSpace) -> StateSpace | None:
    """The chains with a loading for each pattern of what is seen; None where chains differ in it.

    What a pattern leaves out has an infinite deviation, and the value zero.
    """
    seen = space.seen
    if seen is None:
        return space
    value = torch.where(seen, space.value, 0.0)
    if bool((seen.any(-1) == seen.all(-1)).all()):  # of whole steps
        return replace(space, value=value)
    if len(seen) > 1:
        return None
    both = torch.cat([space.measurement.unsqueeze(-1), seen[0].to(space.measurement)], -1)
    patterns, which = torch.unique(both, dim=0, return_inverse=True)
    deviation = space.deviation[:, patterns[:, 0]]
    return replace(
        space,
        loading=space.loading[:, patterns[:, 0]],
        deviation=torch.where(patterns[:, 1:] > 0, deviation, torch.inf),
        measurement=which,
        value=value,
        seen=None,
    )
