"""Gaussian latents in EM steps: their evidence in the E-step, sites with moments in the M-step.

In the E-step one group stands for all sites of a block. In the M-step the sites stand for themselves,
with the posterior moments of what they read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.posteriors.conjugates.conjugate import ConjugateBlock
from pyro_em.posteriors.conjugates.conjugate_solution import ConjugateSolution
from pyro_em.posteriors.conjugates.stacked_conjugates import StackedConjugates
from pyro_em.posteriors.gaussians.gaussian import Arguments, GaussianBlock
from pyro_em.posteriors.gaussians.integrated import Integrated
from pyro_em.posteriors.scales.scaled import ScaledBlock, ScaledSolution

# The posterior of the latents that each group of some number integrates.
Solved = Mapping[int, Integrated | ConjugateSolution | ScaledSolution]

NESTED_BLOCKS = (GaussianBlock, ConjugateBlock, StackedConjugates, ScaledBlock)

Densities = Callable[[Mapping[str, Tensor], Sequence[int]], Mapping[int, Tensor]]


def gaussians_in(solved: Solved) -> dict[int, Integrated]:
    """The posteriors of Gaussian latents among all that groups integrate."""
    found = {g: s.gaussian if isinstance(s, ScaledSolution) else s for g, s in solved.items()}
    return {g: s for g, s in found.items() if not isinstance(s, ConjugateSolution)}


def conjugates_in(solved: Solved) -> dict[int, ConjugateSolution]:
    """The posteriors of conjugate latents among all that groups integrate."""
    found = {g: s.conjugate if isinstance(s, ScaledSolution) else s for g, s in solved.items()}
    return {g: s for g, s in found.items() if isinstance(s, ConjugateSolution)}


def for_updates(graph: FactorGraph) -> FactorGraph:
    """The graph of an M-step: the sites of each block stand for themselves, after all other groups.

    The group of a block stays where it is, and no parameter reaches it.
    """
    if not any(g.nested for g in graph.groups):
        return graph
    own = [n for g in graph.groups if g.nested is not None for n in g.nested.groups]
    return replace(graph, groups=(*map(_disarmed, graph.groups), *own))


def _disarmed(group: Group) -> Group:
    if group.nested is None:
        return group
    return replace(group, arguments={}, bindings={}, raw_params=(), nested=None)


def in_m_step(
    graph: FactorGraph,
    counts: Sequence[Tensor],
    arguments: Sequence[Mapping[str, Tensor]],
    solved: Solved,
    complete: bool = True,
) -> tuple[FactorGraph, list[Tensor], list[dict[str, Tensor]]]:
    """Graph, counts and arguments as an M-step sees them, the sites of blocks with their moments.

    Args:
        graph: That of the E-step.
        counts: Expected counts per group.
        arguments: Per group, at the E-step.
        solved: The posterior of the latents of each group that stands for a block.
        complete: Whether vectors that were seen in part are completed; not for a bound.
    """
    groups = [_disarmed(g) for g in graph.groups]
    all_counts, all_arguments = list(counts), [dict(a) for a in arguments]
    for g, solution in solved.items():
        block = graph.groups[g].nested
        given = arguments[g], counts[g], complete
        if isinstance(solution, ConjugateSolution):
            assert isinstance(block, (ConjugateBlock, StackedConjugates))
            sites = block.believed(solution, *given)
        elif isinstance(solution, ScaledSolution):
            assert isinstance(block, ScaledBlock)
            sites = block.believed(solution, *given)
        else:
            assert isinstance(block, GaussianBlock)
            sites = block.believed(solution, *given)
        for site, weights in sites:
            groups.append(site)
            all_counts.append(weights)
            all_arguments.append(dict(site.arguments))
    return replace(graph, groups=tuple(groups)), all_counts, all_arguments


def at_zero(graph: FactorGraph) -> FactorGraph:
    """The graph as a run with all Gaussian latents at zero shows it."""
    groups: list[Group] = []
    for group in graph.groups:
        groups += group.nested.traced if isinstance(group.nested, NESTED_BLOCKS) else (group,)
    return replace(graph, groups=tuple(groups))


def of_lines(graph: FactorGraph) -> frozenset[int]:
    """Which groups of `at_zero` are Gaussian latents or read some, where none are conjugate."""
    out, places = set[int](), 0
    for group in graph.groups:
        own = len(group.nested.traced) if isinstance(group.nested, NESTED_BLOCKS) else 1
        if isinstance(group.nested, GaussianBlock):
            out.update(range(places, places + own))
        places += own
    return frozenset(out)


def tables_of(
    graph: FactorGraph, arguments: Sequence[Arguments], values: Sequence[Tensor]
) -> tuple[list[Tensor], Solved]:
    """The log densities of all groups, and the posteriors of the latents that some integrate.

    Args:
        graph: The graph of an E-step.
        arguments: Per group.
        values: Per group.
    """
    tables: list[Tensor] = []
    solved: dict[int, Integrated | ConjugateSolution | ScaledSolution] = {}
    for g, (group, own, value) in enumerate(zip(graph.groups, arguments, values, strict=True)):
        if isinstance(group.nested, GaussianBlock):
            found = group.nested.solve(own)
            solved[g] = found
            tables.append(group.nested.table(found))
        elif isinstance(group.nested, (ConjugateBlock, StackedConjugates)):
            known = group.nested.solve(own)
            solved[g] = known
            tables.append(group.nested.table(known))
        elif isinstance(group.nested, ScaledBlock):
            both = group.nested.solve(own)
            solved[g] = both
            tables.append(group.nested.table(both))
        else:
            tables.append(group.log_density(own, value))
    return tables, solved


def expected_densities(
    graph: FactorGraph,
    values: Mapping[str, Tensor],
    groups: Sequence[int],
    densities: Densities,
    trace: Callable[..., FactorGraph],
    own: int,
) -> dict[int, Tensor]:
    """Log densities of groups at parameter values, expected ones of the sites of blocks.

    Args:
        graph: That of an M-step.
        values: Constrained values by name.
        groups: Their numbers.
        densities: Gives those of groups of the E-step's graph.
        trace: Runs the model at given values, for arguments that no binding gives.
        own: How many groups the E-step's graph has; those of blocks' sites follow.
    """
    ordinary = [g for g in groups if g < own and graph.groups[g].belief is None]
    out = dict(densities(values, ordinary)) if ordinary else {}
    fresh: FactorGraph | None = None
    for g in groups:
        site = graph.groups[g]
        if g in ordinary:
            continue
        arguments = site.evaluate_arguments(values)
        if not all(b.is_static for b in site.bindings.values()):
            fresh = trace(values=values, with_bindings=False) if fresh is None else fresh
            traced, _ = fresh.group_of(site.members[0])
            for name, binding in site.bindings.items():
                if not binding.is_static:
                    arguments[name] = traced.arguments[name]
        out[g] = site.log_density(arguments)
    return out
