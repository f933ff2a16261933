"""Notes on a plan: what is allowed, and likely not what the user meant."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

from pyro_em.distributions import is_real
from pyro_em.errors import message, sites_in_words
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.graph.structure import Structure
from pyro_em.plan.program import Program
from pyro_em.posteriors.gaussians.gaussian import GaussianBlock
from pyro_em.tracing.missing import Missing
from pyro_em.tracing.sites import Role
from pyro_em.updates.unbounded import edge_fixes
from pyro_em.updates.update import Fixed, Gradient, ParameterUpdate

_LARGE = 4000  # unknowns whose dense matrix takes seconds and gigabytes at each step

_COPIES = 22  # matrices of that size that an E-step and an M-step hold (measured)

_PRODUCTS = 1e10  # products of numbers a second in one thread, as solvers of this size make them


def notes_on_graph(graph: FactorGraph, structure: Structure) -> tuple[str, ...]:
    """What there is to say of sites and latents, whatever is decided of parameters."""
    return (*_sites_without_data(graph, structure), *_large_matrices(graph))


def notes_on_updates(graph: FactorGraph, updates: Mapping[str, ParameterUpdate]) -> tuple[str, ...]:
    """What there is to say of parameters once their updates are decided."""
    return (*_unconstrained_simplexes(graph, updates), *_support_edges(graph, updates))


def _large_matrices(graph: FactorGraph) -> list[str]:
    """Gaussian latents that are coupled in one large dense matrix, with what a step then takes."""
    found = []
    for group in graph.groups:
        block = group.nested
        if not isinstance(block, GaussianBlock) or block.unknowns <= _LARGE:
            continue
        n = block.dense
        if n <= _LARGE:
            continue
        size, seconds = _COPIES * 8 * n**2 / 2**30, n**3 / _PRODUCTS
        found.append(
            message(
                sites_in_words(list(block.latents)),
                f"{n:,} unknowns are one matrix without zeros: a step takes about {size:.0f} GiB and "
                f"{seconds:,.0f} s of one thread.",
                "nearly every one of them meets every other through sites that read two or more; "
                "the elements of one plate at a time are eliminated for little",
                [
                    "make the smaller plate's effects parameters: pyro.param instead of pyro.sample",
                    "give a guide that draws one of them: ExactPosteriorEM(model, guide)",
                    "fit a part of the data, or fewer levels",
                ],
            )
        )
    return found


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


def _unconstrained_simplexes(
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


def _support_edges(graph: FactorGraph, updates: Mapping[str, ParameterUpdate]) -> list[str]:
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


def _sites_without_data(graph: FactorGraph, structure: Structure) -> list[str]:
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
