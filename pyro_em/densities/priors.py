"""Conjugate priors on point estimates: constants that the sums over the data gain.

A prior that keeps the form of an update (`pyro_em.families.conjugacy`) adds its numerator n₀ and its
denominator d₀ to the expected ones. For the natural parameters it is one more linear density: with
n₀ and d₀ laid out like η, log p(φ) = ⟨N₀, η⟩ + h, and the M-step takes N + N₀. The objective is
the log evidence plus the log prior.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.densities.density import scattered
from pyro_em.densities.natural import Naturals, State
from pyro_em.distributions import bounds
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.tracing.sites import Role
from pyro_em.updates.closed_forms.priors import contributions
from pyro_em.updates.update import ClosedForm, Fixed, ParameterUpdate

Values = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class LogPrior:
    """The log density of point estimates.

    Attributes:
        counts: N₀; None where no natural parameter has a prior. # like η
        base: h, in nats.
        rest: Priors on other parameters, which their families evaluate.
    """

    counts: Tensor | None
    base: float
    rest: tuple[Group, ...]

    def of_natural(self, natural: State | None) -> Tensor | float:
        """log p of the natural parameters in nats."""
        if self.counts is None or natural is None:
            return 0.0
        return torch.dot(self.counts, natural.eta) + self.base

    def of_rest(self, values: Values) -> Tensor | float:
        """log p of all other parameters in nats."""
        total: Tensor | float = 0.0
        for group in self.rest:
            log_p = group.log_density(group.arguments, group.evaluate_value(values))
            total = total + log_p.to(torch.float64).sum()
        return total


def point_groups(graph: FactorGraph) -> list[int]:
    """The groups of point-estimated latents."""
    return [g for g, group in enumerate(graph.groups) if group.role is Role.POINT]


def is_plain_prior(group: Group, updates: Mapping[str, ParameterUpdate], g: int) -> bool:
    """Whether a point-estimated group is a constant density, a known prior of all its parameters.

    Args:
        group: The group.
        updates: The decided updates.
        g: Its number.
    """
    if group.family is None or group.mask is not None or group.value_binding is None:
        return False
    if any(b.params for b in group.bindings.values()) or not group.is_static:
        return False
    if group.distribution == "Uniform":  # the update through tables stays below its upper end
        return False
    for name in group.value_binding.params:
        update = updates[name]
        known = any(p.group == g for p in update.priors)
        if not isinstance(update.update, Fixed) and not known:
            return False
    return True


def log_prior(
    graph: FactorGraph,
    updates: Mapping[str, ParameterUpdate],
    values: Values,
    layout: Naturals | None,
    held: Collection[str] = (),
) -> LogPrior | None:
    """The priors of a collapsed graph; None where one turns out to have no linear form.

    Args:
        graph: A collapsed graph all of whose point-estimated groups are plain priors.
        updates: Collapsed updates.
        values: Parameter values, for their shapes.
        layout: Where the natural parameters are.
        held: Parameters whose priors are known where their rows are.
    """
    in_layout = frozenset() if layout is None else layout.params
    natural: list[Group] = []
    rest: list[Group] = []
    for g in point_groups(graph):
        binding = graph.groups[g].value_binding
        assert binding is not None
        if all(name in held for name in binding.params):
            continue
        inside = [name in in_layout for name in binding.params]
        if any(inside) and not all(inside):
            return None
        (natural if all(inside) else rest).append(graph.groups[g])
    if not natural:
        return LogPrior(None, 0.0, tuple(rest))
    assert layout is not None
    features = []
    for segment in layout.segments:
        if segment.param and updates[segment.param].priors:
            n, d = contributions(updates[segment.param], graph, values[segment.param])
            features += layout.features(segment, n.reshape(-1), d.reshape(-1))
    if not features:  # parameters that the user fixed
        return None
    columns = torch.cat([f.columns for f in features])
    counts = scattered(layout.enter(values).eta, columns, [f.f for f in features])
    bases = [_base(natural, counts, layout, values, which) for which in (0, 1)]
    if not math.isclose(bases[0], bases[1], rel_tol=1e-9, abs_tol=1e-9):
        return None
    return LogPrior(counts, bases[0], tuple(rest))


def _base(
    groups: Sequence[Group], counts: Tensor, layout: Naturals, values: Values, which: int
) -> float:
    """log p less its linear form, at one of two points inside."""
    inside = dict(values)
    for segment in layout.segments:
        if not segment.param:
            continue
        value = values[segment.param].to(torch.float64)
        inside[segment.param] = segment.kind.form.inside(value, which)
    total = sum(
        float(group.log_density(group.arguments, group.evaluate_value(inside)).sum())
        for group in groups
    )
    return total - float(torch.dot(counts, layout.enter(inside).eta))


def may_have_priors(update: ParameterUpdate, graph: FactorGraph, is_natural: bool) -> bool:
    """Whether the M-step on sums of a parameter that has priors is that through tables."""
    if not isinstance(update.update, ClosedForm) or update.kind is None:
        return False
    interval = bounds(graph.parameters[update.name].constraint)
    bounded = interval is not None and math.isfinite(interval[1])
    return is_natural or update.kind.event_dim > 0 or not bounded
