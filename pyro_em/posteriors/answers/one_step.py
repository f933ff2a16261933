"""Errors of one-step predictions of data that read discrete latents alone.

    e_t = (y_t − E[y_t | y_1, …, y_{t−1}]) / sd(y_t | y_1, …, y_{t−1})

What is predicted is a mixture over the values of the latents: with weights w_k = p(z = k | y_1, …,
y_{t−1}), means m_k and variances v_k,

    E[y] = Σ w_k m_k,     Var(y) = Σ w_k (v_k + (m_k − E[y])²).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_em.errors import UsageError, message
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.incomplete import IncompleteMultivariateNormal
from pyro_em.posteriors.answers.gaussian_predictions import value_rows
from pyro_em.posteriors.messages.steps import predicted_cells, steps_of
from pyro_em.tracing.sites import Role
from pyro_em.updates.expectations.gaussian_rows import event_shape


def standardised_rows(
    group: Group, arguments: Mapping[str, Tensor], weights: Tensor, where: str
) -> Tensor:
    """Errors over their standard deviations.

    Args:
        group: Observed sites.
        arguments: Those of its distribution, at the parameters of the posterior.
        weights: The probability of each cell before the data of its step. # (members, *sizes)
        where: What was asked for.

    Returns:
        NaN where nothing was observed. # (members · rows, D)

    Raises:
        UsageError: If the distribution has no moments that are numbers.
    """
    fn = _distribution(group, arguments)
    event = event_shape(group)
    shape = (len(group.members), *group.sizes, *event)
    known = None if fn is None else _moments(fn)
    if known is None or not all(bool(torch.isfinite(t).all()) for t in known):
        raise UsageError(
            message(
                where,
                f"{group.distribution} has no mean and variance that errors could be measured by.",
                "the codes of categories are names, and some distributions have no moments",
                [
                    "ask for the probabilities of what comes: em.forecast(x), of a series whose later "
                    "steps are NaN",
                    "compare the evidence of a series with that of a shorter one: em.score",
                ],
            )
        )
    mean, variance = (t.to(torch.float64).expand(shape) for t in known)
    first = 1 + group.n_plates
    axes = tuple(range(first, first + len(group.sizes) - group.n_plates))
    if axes:
        w = weights.to(mean).reshape(*weights.shape, *(1,) * len(event))
        centre = (w * mean).sum(axes, keepdim=True)
        variance = (w * (variance + (mean - centre).square())).sum(axes)
        mean = centre.squeeze(axes)
    rows = len(group.members) * torch.Size(group.sizes[: group.n_plates]).numel()
    mean, variance = (t.reshape(rows, event.numel()) for t in (mean, variance))
    return (value_rows(group) - mean) / variance.sqrt()


def _distribution(group: Group, arguments: Mapping[str, Tensor]) -> Any | None:
    """The distribution of all members and cells; None where it is none of Pyro's with its arguments."""
    if group.family is None:
        return None
    cls = group.family.distribution
    if cls is IncompleteMultivariateNormal:
        cls = dist.MultivariateNormal
    try:
        return cls(**arguments, validate_args=False)
    except (TypeError, ValueError):
        return None


def _moments(fn: Any) -> tuple[Tensor, Tensor] | None:
    try:
        return fn.mean, fn.variance
    except NotImplementedError:
        return None


def cells_before(
    graph: FactorGraph, tables: Sequence[Tensor], g: int, steps: Tensor
) -> Tensor | None:
    """The probabilities of a group's cells before the data of their step, by messages of a chain.

    Args:
        graph: The factor graph.
        tables: Log densities per group. # (members, *sizes)
        g: The group of the data.
        steps: At which step each member comes. # (members,)

    Returns:
        # (members, *sizes); None where the graph is no chain whose data come as its latents do.
    """
    chain = steps_of(graph)
    if chain is None:
        return None
    data = {k for k, group in enumerate(graph.groups) if group.role is Role.DATA}
    single = dict(chain.single)
    if not data <= {*single, *chain.free} or g not in single:
        return None
    if list(single[g]) != steps.tolist():
        return None
    found = predicted_cells(graph, tables, data)  # (T, *plates of the latents, K)
    group = graph.groups[g]
    own = found[list(single[g])]
    plates = group.dims[0][: group.n_plates]
    shape = [s if p in chain.plates else 1 for p, s in zip(plates, group.sizes, strict=False)]
    return own.reshape(len(own), *shape, chain.K).expand(len(own), *group.sizes)
