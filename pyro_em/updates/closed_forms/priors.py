"""Conjugate priors in a closed form: what they add to numerators and denominators.

With n₀ and d₀ of the prior (`pyro_em.families.conjugacy`), the M-step of MAP solves the same form for

    n + n₀   and   d + d₀.

Where the spread of a mean's prior is the spread of the data times a known factor, the mean is one more
datum for that spread: with Normal(μ | m, c σ), n₀ = (μ − m)² / c² and d₀ = 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from pyro_em.errors import DegenerateError, message
from pyro_em.families.conjugacy import conjugate
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.updates.expectations.scatter import component_in_words, onto_events
from pyro_em.updates.expectations.statistics import group_statistics
from pyro_em.updates.update import ParameterUpdate, Prior


def prior_contribution(
    update: ParameterUpdate,
    prior: Prior,
    graph: FactorGraph,
    value: Tensor,
    event: int,
    values: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """What a conjugate prior adds, on the parameter's events; see `contributions`."""
    group = graph.groups[prior.group]
    if prior.argument:
        return _spread_contribution(update, prior, group, value, event, values)
    assert group.family is not None and update.kind is not None
    maps = tuple(m.name for m in update.uses[0].selection.maps)
    link = update.uses[0].rule.link.name
    rule = conjugate(group.family.distribution, update.kind, maps, link)
    assert rule is not None
    batch = prior.selection.index.dim() - event
    arguments = _arguments(group, None if prior.is_constant else values)
    if event:  # a scalar prior of a vector is kept below its expansion, an event is not
        last = prior.selection.index.shape[batch:]
        arguments = {
            name: a
            if group.family.argument_dims.get(name, 0)
            else a.expand(*a.shape[:batch], *last)
            for name, a in arguments.items()
        }
    n, d = rule(arguments)
    weight = group.weights().to(n.dtype)
    for _ in range(batch - weight.dim()):
        weight = weight.unsqueeze(-1)
    # A vector's elements may have a plate of their own, and then a weight each.
    batch = weight.dim()
    n = n * weight.reshape(weight.shape + (1,) * (n.dim() - batch))
    d = d * weight.reshape(weight.shape + (1,) * (d.dim() - batch))
    return onto_events(update.kind, prior.selection, n, d, value, event)


def _arguments(group: Group, values: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The arguments of a prior at parameter values; as traced where None."""
    found = group.arguments if values is None else group.evaluate_arguments(values)
    return {name: a.detach() for name, a in found.items()}


def _spread_contribution(
    update: ParameterUpdate,
    prior: Prior,
    group: Group,
    value: Tensor,
    event: int,
    values: Mapping[str, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """What the prior of a mean adds to the spread that it has in common with the data."""
    assert group.family is not None and update.kind is not None
    rule = group.family.rules[prior.argument]
    arguments = _arguments(group, values)
    present = replace(group, value=group.evaluate_value(values).detach())
    weight = group.weights().expand(len(group.members), *group.sizes)
    statistics = group_statistics(present, weight, arguments)
    n, d = rule.contribution({**statistics, "reference:loc": arguments["loc"]}, arguments)
    return onto_events(update.kind, prior.selection, n, d, value, event)


def refuse_boundary_mode(
    update: ParameterUpdate, graph: FactorGraph, n: Tensor, d: Tensor, value: Tensor
) -> None:
    """A prior such as Dirichlet(0.5) is unbounded where a component has too little data."""
    kind = update.kind
    assert kind is not None
    bad = kind.form.outside(n, d)
    if bad is None:
        return
    size = float(d.abs().max().clamp(min=1.0))
    rounding = 64 * torch.finfo(n.dtype).eps * size
    rounded = (bad < 0) & (bad >= -rounding)
    if kind.form.is_row:
        n.masked_fill_(rounded, 0.0)
    bad = bad.masked_fill(rounded, 0.0)
    if not bool((bad < 0).any()):
        return
    place = (bad < 0).nonzero()[0].tolist()
    event = kind.event_dim
    row = component_in_words(value, event, place[0]) if value.dim() > event else ""
    where = f"{row}, value {place[1]}" if row and event else row
    where = where or (f"component {place[1]}" if event else "its only component")
    sites = ", ".join(f"'{graph.groups[p.group].members[0]}'" for p in update.priors)
    names = "/".join(sorted({graph.groups[p.group].distribution for p in update.priors}))
    raise DegenerateError(
        message(
            f"site {sites}, {where}",
            f"its posterior mode is on the boundary: expected count plus prior count minus one is "
            f"{float(bad[tuple(place)]):.4g} < 0, and the density is unbounded there. The update "
            "was rolled back.",
            f"a {names} prior with a concentration below one favours the boundary more than these "
            "data speak against it",
            [
                "use a concentration of at least one (exactly one is maximum likelihood)",
                "make it a parameter without a prior: pyro.param instead of pyro.sample",
                "use a guide with a spread: ExactPosteriorEM(model, AutoNormal)",
            ],
        )
    )


def contributions(
    update: ParameterUpdate,
    graph: FactorGraph,
    value: Tensor,
    values: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """n₀ and d₀ of all priors of a parameter, on its events, in float64.

    Args:
        update: A closed form with priors.
        graph: The collapsed graph.
        value: The parameter's value, for its shape.
        values: All parameters as they are now, for priors that depend on them; as traced where None.
    """
    assert update.kind is not None
    wide = value.to(torch.float64)
    parts = [
        prior_contribution(update, p, graph, wide, update.kind.event_dim, values)
        for p in update.priors
    ]
    n, d = (torch.stack([p[i].to(torch.float64) for p in parts]).sum(0) for i in (0, 1))
    return n, d
