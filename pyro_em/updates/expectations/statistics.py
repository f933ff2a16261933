"""Expectation: what the M-step needs to know of the data, as one additive value.

S = Σ_cells q(cell) T(x),   log p(x; θ),   and both of two parts of the data add up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_em.families.family import Arguments, Statistics
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.reduction.trees import SAME
from pyro_em.updates.expectations.conjugate_beliefs import PriorInRows

Key = int | str

_MANY = 2**18  # cells of which a product is made at once

NATURAL = "natural"  # the key of the features of all linear groups together


@dataclass(frozen=True, eq=False)
class Expectation:
    """Evidence and sums over data at some parameters: all of the data that an M-step needs.

    Values taken at the same parameters can be added (parts of the data) and scaled.

    Attributes:
        log_evidence: log p(x; θ) in nats, where it was computed.
        sums: E_q[T(x)] by name, per group of factors (summed over every dimension that no argument
            varies along), or for all linear groups together (`NATURAL`).
        references: Per group the arguments about which its sums were taken, where they matter.
        noise: How far rounding may carry the evidence, in nats, beyond that of a sum.
    """

    log_evidence: float
    sums: Mapping[Key, Statistics]
    references: Mapping[int, Arguments] = field(default_factory=dict, metadata=SAME)
    noise: float = 0.0

    def __add__(self, other: Expectation) -> Expectation:
        both = {
            key: {name: s + other.sums[key][name] for name, s in named.items()}
            if key in other.sums
            else named
            for key, named in self.sums.items()
        }
        rest = {key: named for key, named in other.sums.items() if key not in both}
        return Expectation(
            self.log_evidence + other.log_evidence,
            {**both, **rest},
            {**other.references, **self.references},
            self.noise + other.noise,
        )

    def __mul__(self, factor: float) -> Expectation:
        sums = {key: {n: factor * s for n, s in named.items()} for key, named in self.sums.items()}
        noise = abs(factor) * self.noise
        return Expectation(factor * self.log_evidence, sums, self.references, noise)

    __rmul__ = __mul__

    @property
    def holds_many(self) -> bool:
        """Whether it holds numbers of each of many rows."""
        return any(t.numel() > 2**20 for named in self.sums.values() for t in named.values())

    def of(self, group: int) -> Statistics:
        """The statistics of a group together with their references."""
        named = {f"reference:{n}": a for n, a in self.references.get(group, {}).items()}
        return {**self.sums[group], **named}


def group_statistics(
    group: Group, counts: Tensor, arguments: Arguments, known: Statistics | None = None
) -> Statistics:
    """Σ counts · T(x) for one group, kept along the dimensions in which an argument varies.

    Args:
        group: The stacked factors.
        counts: Expected counts. # (members, *sizes)
        arguments: The arguments of the E-step. # (members, *sizes or 1s, *event)
        known: T(x), where it was computed before.

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
            if a.dim() - family.argument_dims.get(name, 0) == batch
        )
        for d in range(batch)
    ]
    if isinstance(group.belief, PriorInRows) and not any(varying):
        return group.belief.summed(family, counts)
    weights = counts.to(group.value.dtype if group.value.is_floating_point() else _dtype(arguments))
    if family.natural is not None:  # Newton steps need more digits than a ratio of sums
        weights = weights.to(torch.float64)
    weights = weights.reshape(weights.shape + (1,) * group.event_dims)
    if group.belief is not None:
        known = group.belief.statistics(group, arguments)
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
    log_evidence: float = math.nan,
) -> Expectation:
    """Collect the statistics of some groups of a graph.

    Args:
        graph: The factor graph.
        counts: Expected counts per group.
        arguments: Arguments per group at the E-step.
        groups: Which groups to collect.
        log_evidence: log p(x; θ) in nats, where it is known.
    """
    sums: dict[Key, Statistics] = {
        g: group_statistics(graph.groups[g], counts[g], arguments[g]) for g in groups
    }
    references = {g: {n: a.detach() for n, a in arguments[g].items()} for g in groups}
    return Expectation(log_evidence, sums, references)


def known_statistics(group: Group) -> Statistics | None:
    """T(x) of a group whose statistics do not change with the arguments, else None."""
    family = group.family
    if family is None or family.has_reference or group.belief is not None:
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
        known: T(x), where it was computed before.
        masked: Whether the counts are zero where the group is masked.
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


def as_float64(t: Tensor) -> Tensor:
    """A tensor of sums in float64, whatever the data are; integers stay what they are."""
    return t.to(torch.float64) if t.is_floating_point() else t


def dot(weight: Tensor, table: Tensor) -> Tensor:
    """Σ w log p with 0 · −inf = 0, in float64."""
    table = table.to(torch.float64)
    steps = zip(weight.stride(), weight.shape, strict=True)
    if weight.shape == table.shape and not any(step for step, n in steps if n > 1):
        # One number counts for all.
        own = weight.flatten()[:1].squeeze()
        return torch.where(own == 0, 0.0, own * table.sum())
    alike = [
        i
        for i, size in enumerate(table.shape)
        if size > 1 and table.stride(i) == 0 and weight.dim() == table.dim()
    ]
    if alike:  # members that share their densities: their weights are summed first
        weight = weight.expand(table.shape).sum(alike, keepdim=True)
        for i in alike:
            table = table.narrow(i, 0, 1)
    if weight.shape == table.shape and table.numel() > _MANY:
        return torch.stack(
            [_dot(*p) for p in zip(*map(_parts, (weight, table)), strict=True)]
        ).sum()
    return _dot(weight, table)


def _dot(weight: Tensor, table: Tensor) -> Tensor:
    return torch.where(weight == 0, 0.0, weight * table).sum()


def _parts(t: Tensor) -> tuple[Tensor, ...]:
    """A tensor in parts along its longest dimension, each of about so many cells."""
    along = max(range(t.dim()), key=lambda d: t.shape[d])
    return t.split(max(1, _MANY * t.shape[along] // t.numel()), along)
