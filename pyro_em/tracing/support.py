"""Densities of values that a distribution cannot have: −∞ there, and a clean gradient elsewhere.

Where a latent chooses among distributions of different supports, each row meets all of them: a
negative number has density zero under a LogNormal, and that is no error.
"""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import MaskedMixture
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from torch import Tensor

from pyro_em.tracing.feasible import without_masked_nonsense


def density_anywhere(fn: Any, value: Tensor) -> Tensor:
    """log p(value), −∞ outside the support. # (*batch)

    Args:
        fn: A distribution.
        value: Its values. # (*batch or 1s, *event)

    Example:
        >>> import pyro.distributions as dist
        >>> density_anywhere(dist.Exponential(torch.ones(2)), torch.tensor([1.0, -1.0]))
        tensor([-1., -inf])
    """
    if isinstance(fn, MaskedMixture):
        parts = [density_anywhere(c, value) for c in (fn.component0, fn.component1)]
        return torch.where(fn.mask, parts[1], parts[0])
    if isinstance(fn, torch.distributions.Independent):
        inner = density_anywhere(fn.base_dist, value)
        over = tuple(range(-fn.reinterpreted_batch_ndims, 0))
        return inner.sum(over) if over else inner
    if isinstance(fn, MaskedDistribution):
        return torch.where(torch.as_tensor(fn._mask), density_anywhere(fn.base_dist, value), 0.0)
    if isinstance(fn, ExpandedDistribution):
        inner = density_anywhere(fn.base_dist, value)
        return inner.expand(torch.broadcast_shapes(inner.shape, fn.batch_shape))
    try:
        inside = fn.support.check(value)
    except (NotImplementedError, AttributeError):
        return fn.log_prob(value)
    if bool(inside.all()):
        return fn.log_prob(value)
    full = value.expand(inside.shape + value.shape[value.dim() - fn.event_dim :])
    safe = without_masked_nonsense(fn, full, inside)
    return torch.where(inside, fn.log_prob(safe), -torch.inf)
