"""The rows of a plan: the route of every unobserved site, what is observed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pyro_em.errors import Finding
from pyro_em.globs import is_match
from pyro_em.graph.mixtures import is_component
from pyro_em.graph.structure import Structure
from pyro_em.tracing.sites import Role
from pyro_em.variational.pair import Routing


def routes_with_guide(bare: Structure, routing: Routing) -> tuple[Route, ...]:
    """The route of every unobserved site of a model that has a guide."""
    words = {
        **dict.fromkeys(routing.points, "point estimate"),
        **dict.fromkeys(routing.drawn, "guide"),
    }
    routes = []
    for route in routes_of(bare):
        name = route.site
        if name in words:
            why, kept = routing.reasons[name], routing.kept.get(name)
            routes.append(replace(route, route=words[name], reason=why, not_exact=kept))
        elif name in routing.gaussian:
            unused = "; its guide site is not used" if name in routing.unused else ""
            word, how = "Gaussian", "linear in"
            if name in routing.kernels:
                word, how = "conjugate", "conjugate to"
            reason = f"{how} {_children(bare, name)} given what is drawn{unused}"
            routes.append(replace(route, route=word, reason=reason))
        elif name in routing.reasons:
            routes.append(replace(route, reason=routing.reasons[name]))
        elif name in routing.unused:
            reason = f"{route.reason}; its guide site is not used"
            routes.append(replace(route, reason=reason))
        else:
            routes.append(route)
    return tuple(routes)


def _children(structure: Structure, name: str) -> str:
    return ", ".join([f"'{c}'" for p, c in structure.edges if p == name][:3])


def unknown_strategies(strategy: Any, latents: Iterable[str]) -> list[str]:
    """Names and globs in a dict of strategies that match no latent."""
    if not isinstance(strategy, Mapping):
        return []
    names = list(latents)
    return [p for p in strategy if not any(is_match(n, p) for n in names)]


def matching(strategy: Any, name: str) -> Any:
    """The strategy of one latent where ``strategy`` may be a dict of names and globs."""
    if not isinstance(strategy, Mapping):
        return strategy
    if name in strategy:
        return strategy[name]
    hits = [s for pattern, s in strategy.items() if is_match(name, pattern)]
    return hits[0] if hits else "exact"


@dataclass(frozen=True)
class Route:
    """How one unobserved site is treated, and why.

    Attributes:
        site: The site's name.
        distribution: Its distribution.
        route: ``"enumerate"``, ``"Gaussian"``, ``"conjugate"``, ``"integrates to one"``,
            ``"point estimate"``, ``"guide"``, or ``"none"`` where there is none; everything but a
            plan then raises.
        size: Number of values summed over, or None.
        plates: Its plates.
        reason: Why, in words.
        finding: What leaves it without a route, with the fixes to try; else None.
        not_exact: Why a Gaussian latent stays with the guide, with the fixes to try; else None.
    """

    site: str
    distribution: str
    route: str
    size: int | None
    plates: tuple[str, ...]
    reason: str
    finding: Finding | None = None
    not_exact: Finding | None = None


@dataclass(frozen=True)
class Observation:
    """One observed site: its name, the name of its distribution, its plates left to right."""

    site: str
    distribution: str
    plates: tuple[str, ...]


def routes_of(structure: Structure, with_components: bool = False) -> tuple[Route, ...]:
    """The route of every unobserved site.

    Args:
        structure: The skeleton of a model.
        with_components: Whether its observed mixtures have their components as latents.
    """
    routes = []
    for name in structure.latents:
        info = structure.sites[name]
        own = with_components and is_component(name)
        which = "the component of an observed mixture; " if own else ""
        routes.append(
            Route(
                name,
                info.distribution,
                "enumerate",
                info.support_size,
                info.plates,
                which + "finite support, exact sum",
            )
        )
    for name, distribution in structure.barren.items():
        routes.append(
            Route(
                name,
                distribution,
                "integrates to one",
                None,
                (),
                "no observed site depends on it",
            )
        )
    return tuple(routes)


def observations_of(structure: Structure) -> tuple[Observation, ...]:
    """The observed sites."""
    return tuple(
        Observation(i.name, i.distribution, i.plates)
        for i in structure.sites.values()
        if i.role is Role.DATA
    )
