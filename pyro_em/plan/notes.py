"""Notes on a plan: what is allowed, and likely not what the user meant."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

from pyro_em.distributions import is_real
from pyro_em.errors import message
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.graph.structure import Structure
from pyro_em.plan.program import Program
from pyro_em.tracing.missing import Missing
from pyro_em.tracing.sites import Role
from pyro_em.updates.unbounded import edge_fixes
from pyro_em.updates.update import Fixed, Gradient, ParameterUpdate


def unbounded_priors(program: Program) -> list[str]:
    """Point estimates by gradient under priors whose density is unbounded at the boundary.

    A closed form finds out whether the data speak against the boundary, and names the component.
    """
    found = []
    for group in program.graph.groups:
        below = [v for n, v in group.arguments.items() if n.startswith("concentration")]
        updates = [program.updates.get(n) for n in group.params]  # none where no M-step follows
        climbs = any(u is None or isinstance(u.update, Gradient) for u in updates)
        kind = group.distribution
        if group.role is not Role.POINT or kind not in ("Beta", "Dirichlet", "Gamma") or not climbs:
            continue
        if any(bool((v < 1).any()) for v in below):
            found.append(
                message(
                    f"site '{group.members[0]}'",
                    f"its {kind} prior has a concentration below one, and its update is a gradient.",
                    "the density is unbounded at the boundary: where the data do not speak against "
                    "it the estimate runs there, until rounding stops it",
                    [
                        "use a concentration of at least one",
                        "make it a parameter without a prior: pyro.param instead of pyro.sample",
                        "use a guide with a spread: ExactPosteriorEM(model, AutoNormal)",
                    ],
                )
            )
    return found


def unconstrained_simplexes(
    graph: FactorGraph, updates: Mapping[str, ParameterUpdate]
) -> list[str]:
    """Probabilities without a constraint: they are normalised, but counted as free numbers."""
    return [
        message(
            f"parameter '{name}'",
            "it has no constraint but is used as probabilities.",
            "the number of free parameters, and so BIC and AIC, count every element",
            ["declare it: pyro.param(..., constraint=constraints.simplex)"],
        )
        for name, u in updates.items()
        if u.is_row
        and all(use.rule.link.name == "identity" and not use.selection.maps for use in u.uses)
        and not isinstance(u.update, Fixed)
        and is_real(graph.parameters[name].constraint)
    ]


def support_edges(graph: FactorGraph, updates: Mapping[str, ParameterUpdate]) -> list[str]:
    """Parameters at which the support of the data ends, and that a gradient is to move."""
    where: dict[str, Group] = {}
    for group in graph.groups:
        for name in group.edges:
            where.setdefault(name, group)
    inwards = [
        message(
            f"parameter '{name}'",
            f"the support of components of '{g.members[0]}' ({g.distribution}) ends at it.",
            "a component has weight only for rows within its bounds: EM moves them inwards, to the "
            "outermost of these rows, and never outwards, so that starts decide",
            ["begin with wide intervals that differ, or compare several starts"],
        )
        for name, g in where.items()
        if updates[name].is_end and len(g.sizes) > g.n_plates
    ]
    return inwards + [
        message(
            f"parameter '{name}'",
            f"the support of site '{g.members[0]}' ({g.distribution}) ends at it.",
            "the likelihood rises until the support meets the outermost row, and is zero beyond: a "
            "gradient does not see that jump, and a fit may end without an estimate",
            edge_fixes(name),
        )
        for name, g in where.items()
        if isinstance(updates[name].update, Gradient)
    ]


def sites_without_data(graph: FactorGraph, structure: Structure) -> list[str]:
    """Observed sites all of whose entries are missing, in all steps where they are steps."""
    if not any(m.entries == m.of for m in graph.missing):
        return []
    data = [i.name for i in structure.sketch.sites.values() if i.role is Role.DATA]
    steps = Counter(_glob(name.removesuffix("_observed")) for name in data)
    lost: dict[str, list[Missing]] = {}
    for m in graph.missing:
        lost.setdefault(_glob(m.site), []).append(m)
    found = [
        own[0].site if len(own) == 1 else glob
        for glob, own in lost.items()
        if all(m.entries == m.of for m in own)
        and (len(own) >= steps[glob] or any(m.site == glob for m in own))
    ]
    return [
        message(
            f"site '{site}'",
            "all of its entries are missing.",
            "nothing is learnt from it; a mean or a standard deviation that is computed with NaN makes "
            "everything NaN that is computed from it",
            ["standardise by what is there: (x - x.nanmean(0)) / x[~x.isnan().any(1)].std(0)"],
        )
        for site in found
    ]


def _glob(name: str) -> str:
    return re.sub(r"\d+$", "*", name)
