"""Notes on a plan: what is allowed, and likely not what the user meant."""

from __future__ import annotations

from collections.abc import Mapping

from pyro_em.distributions import is_real
from pyro_em.errors import message
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.plan.program import Program
from pyro_em.tracing.sites import Role
from pyro_em.updates.m_step import edge_fixes
from pyro_em.updates.update import Fixed, Gradient, ParameterUpdate


def unbounded_priors(program: Program) -> list[str]:
    """Point estimates by gradient under priors whose density is unbounded at the boundary.

    A closed form finds out whether the data speak against the boundary, and names the component.
    """
    found = []
    for group in program.graph.groups:
        below = [v for n, v in group.arguments.items() if n.startswith("concentration")]
        climbs = any(isinstance(program.updates[n].update, Gradient) for n in group.params)
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
    return [
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
