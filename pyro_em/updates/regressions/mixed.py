"""Parameters that sites of different kinds read: a coefficient of a mean and of a log rate, say.

Each site alone would have its update: least squares here, Newton's method there. Together no sums of
one form tell the maximum, and one parameter after the other does not reach it. All parameters of these
sites are found by Newton's method at once, positive ones by their logarithms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from pyro_em.distributions import is_real
from pyro_em.graph.factors import FactorGraph
from pyro_em.tracing.sites import Role
from pyro_em.updates.regressions.coefficient_priors import is_quadratic, is_smooth
from pyro_em.updates.regressions.dispersed import Dispersed, wholly_at
from pyro_em.updates.update import ClosedForm, Fixed, Gradient, Newton, ParameterUpdate

_FEW = 2**8  # numbers whose second derivatives are few in any case


def with_mixed(
    graph: FactorGraph, decided: Mapping[str, ParameterUpdate]
) -> dict[str, ParameterUpdate]:
    """Blocks of parameters that sites of different kinds read, with all that these sites read besides.

    Args:
        graph: The factor graph.
        decided: What was decided for each parameter alone.
    """
    out = dict(decided)
    for name, update in decided.items():
        if not update.is_mixed or out[name].block:
            continue
        found = _closure(graph, name, decided)
        if found is None:
            continue
        names, sites = found
        places = dict.fromkeys(p for s in sites for p in s.places(name))
        block = tuple(n for n in graph.parameters if n in names)
        for n in block:
            reason = f"{' and '.join(places)} read it" if n == name else f"found with '{name}'"
            priors = decided[n].priors
            out[n] = ParameterUpdate(n, Newton(), reason, block=block, priors=priors, is_mixed=True)
    left = {n: u for n, u in out.items() if u.is_mixed and not isinstance(u.update, Newton)}
    return out | {n: replace(u, is_mixed=False, priors=()) for n, u in left.items()}


def _closure(
    graph: FactorGraph, name: str, decided: Mapping[str, ParameterUpdate]
) -> tuple[set[str], list[Dispersed]] | None:
    """All parameters that share a site with one, directly or through others, and these sites.

    None where one of them is no matter of predictors.
    """
    names, waiting = {name}, [name]
    sites: dict[int, Dispersed] = {}
    while waiting:
        own = waiting.pop()
        for g, group in enumerate(graph.groups):
            if own not in group.params or g in sites or group.role is Role.POINT:
                continue
            site = wholly_at(g, group, graph.parameters)
            if site is None:
                return None
            sites[g] = site
            new = [
                p
                for p in site.params
                if p not in names and not isinstance(decided[p].update, Fixed)
            ]
            names.update(new)
            waiting += new
    bindings = [b for s in sites.values() for b in s.bindings.values()]
    straight = {p for b in bindings for p in b.params if p not in b.logs}
    by_logs = {p for b in bindings for p in b.logs}
    if straight & by_logs or sum(graph.parameters[p].leaf.numel() for p in names) > _FEW:
        return None
    return (
        (names, list(sites.values())) if all(_may_join(graph, decided[p]) for p in names) else None
    )


def _may_join(graph: FactorGraph, update: ParameterUpdate) -> bool:
    """Whether a parameter may be found with others: nobody asked otherwise, and its priors allow it."""
    fits = is_quadratic if is_real(graph.parameters[update.name].constraint) else is_smooth
    if not all(fits(graph, p) for p in update.priors):
        return False
    if isinstance(update.update, Gradient):
        return update.is_mixed and update.update.optimizer is None
    return not (isinstance(update.update, ClosedForm) and update.update.floor > 0)
