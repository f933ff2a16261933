"""ExpectedStatistics: what the M-step needs to know of the data, as one additive value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.families.family import Arguments, Statistics
from pyro_em.graph.factors import FactorGraph, Group


@dataclass(frozen=True, eq=False)
class ExpectedStatistics:
    """E_q[T(x)] per group of factors, summed over every dimension that no argument varies along.

    Values computed about the same reference arguments can be added and scaled.

    Attributes:
        sums: Per group the family's statistics and ``weight``.
        references: Per group the arguments about which they were taken.
    """

    sums: Mapping[int, Statistics]
    references: Mapping[int, Arguments]

    def __add__(self, other: ExpectedStatistics) -> ExpectedStatistics:
        sums = {
            g: {name: stats[name] + other.sums[g][name] for name in stats}
            for g, stats in self.sums.items()
        }
        return ExpectedStatistics(sums, self.references)

    def __mul__(self, factor: float) -> ExpectedStatistics:
        sums = {g: {n: factor * s for n, s in stats.items()} for g, stats in self.sums.items()}
        return ExpectedStatistics(sums, self.references)

    __rmul__ = __mul__

    def of(self, group: int) -> Statistics:
        """The statistics of a group together with their references."""
        named = {f"reference:{n}": a for n, a in self.references[group].items()}
        return {**self.sums[group], **named}


def group_statistics(
    group: Group, counts: Tensor, arguments: Arguments, known: Statistics | None = None
) -> Statistics:
    """Σ counts · T(x) for one group, kept along the dimensions in which an argument varies.

    Args:
        group: The stacked factors.
        counts: Expected counts. # (members, *sizes)
        arguments: The arguments of the E-step. # (members, *sizes or 1s, *event)
        known: T(x), where it was worked out before.

    Returns:
        Statistics. # (members, *sizes or 1s, *to_event dims, *event)
    """
    family = group.family
    assert family is not None
    batch = 1 + len(group.sizes) + group.event_dims
    varying = [
        any(
            a.shape[d] > 1
            for name, a in arguments.items()
            if a.dim() - family.argument_event_dim(name) == batch
        )
        for d in range(batch)
    ]
    weights = counts.to(group.value.dtype if group.value.is_floating_point() else _dtype(arguments))
    weights = weights.reshape(weights.shape + (1,) * group.event_dims)
    return family.expected_statistics(
        weights, group.value, arguments, tuple(varying), known, group.elements
    )


def _dtype(arguments: Arguments) -> torch.dtype:
    return next(a.dtype for a in arguments.values() if a.is_floating_point())


def expected_statistics(
    graph: FactorGraph,
    counts: Sequence[Tensor],
    arguments: Sequence[Arguments],
    groups: Sequence[int],
) -> ExpectedStatistics:
    """Collect the statistics of some groups of a graph.

    Args:
        graph: The factor graph.
        counts: Expected counts per group.
        arguments: Arguments per group at the E-step.
        groups: Which groups to collect.
    """
    sums = {g: group_statistics(graph.groups[g], counts[g], arguments[g]) for g in groups}
    return ExpectedStatistics(
        sums, {g: {n: a.detach() for n, a in arguments[g].items()} for g in groups}
    )


@dataclass(frozen=True, eq=False)
class Sums:
    """Evidence and expected statistics at some parameters: all that an exact EM step needs.

    Attributes:
        log_evidence: In nats.
        features: Expected features of linear groups; None where there are none. # like η
        moments: Per Gaussian group Σ r d and Σ r d dᵀ, and Σ r. # (K, P), (K,)
        statistics: Of all other groups, without references.
        noise: How far rounding may carry the evidence, in nats, beyond that of a sum.
    """

    log_evidence: float
    features: Tensor | None
    moments: Mapping[int, tuple[Tensor, Tensor]]
    statistics: Mapping[int, Statistics]
    noise: float = 0.0


def known_statistics(group: Group) -> Statistics | None:
    """T(x) of a group whose statistics do not change with the arguments, else None."""
    family = group.family
    if family is None or family.has_reference:
        return None
    arguments = {name: a.detach() for name, a in group.arguments.items()}
    floating = next((a.dtype for a in arguments.values() if a.is_floating_point()), torch.float64)
    return {
        name: t if t.is_floating_point() else t.to(floating)
        for name, t in family.statistics(group.value, arguments).items()
    }


def group_sums(
    group: Group,
    counts: Tensor,
    arguments: Mapping[str, Tensor],
    known: Statistics | None = None,
    *,
    masked: bool = False,
) -> Statistics:
    """Σ counts · T(x) of a group, whose masked cells count nothing.

    Args:
        group: The group.
        counts: Posterior probabilities; sums over dimensions along which nothing of the group
            varies are of size one. # (members, *sizes or 1s)
        arguments: At the E-step.
        known: T(x), where it was worked out before.
        masked: Whether the counts know of the mask already.
    """
    if group.mask is not None and not masked:
        counts = counts * group.mask
    return group_statistics(group, counts, arguments, known)


def expected_log_joint(counts: Sequence[Tensor], log_densities: Sequence[Tensor]) -> float:
    """E_q[log p(x, z; θ)] in nats; 0 · −inf counts as 0."""
    total = 0.0
    for weight, table in zip(counts, log_densities, strict=True):
        total += float(dot(weight, table))
    return total


def dot(weight: Tensor, table: Tensor) -> Tensor:
    """Σ w log p with 0 · −inf = 0, in float64."""
    table = table.to(torch.float64)
    return torch.where(weight == 0, 0.0, weight * table).sum()
