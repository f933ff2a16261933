"""A model that has a latent without a route: there is a plan that says so, and nothing to run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pyro_em.errors import Finding, PyroEMError
from pyro_em.graph.stretches import LaterTuple
from pyro_em.graph.structure import Structure
from pyro_em.plan.plan import Plan
from pyro_em.plan.routes import Route, observations_of, routes_of
from pyro_em.posteriors.elimination import ContractionPlan
from pyro_em.updates.update import Fixed, NoUpdate, ParameterUpdate, Update
from pyro_em.variational.guide import GuideLook


@dataclass(frozen=True, eq=False)
class Unrouted:
    """What a look found where a latent has no route.

    Attributes:
        structure: The model's skeleton.
        routes: One row per unobserved site, those without a route with their finding.
        error: What everything but a plan raises.
        parameters: Those of the model, and of its guide.
        cost: The enumeration that is past the budget, where that is the finding.
    """

    structure: Structure
    routes: Sequence[Route]
    error: PyroEMError
    parameters: tuple[str, ...]
    cost: ContractionPlan | None = None

    def plan(self, requested: Mapping[str, Update]) -> Plan:
        """The decisions, as a value that prints.

        Args:
            requested: The user's updates by parameter name.
        """
        missing = dict.fromkeys(r.site for r in self.routes if r.route == "none")
        shown = ", ".join(f"'{n}'" for n in list(missing)[:3]) + (", …" if len(missing) > 3 else "")
        why = f"no M-step: {shown} " + ("has no route" if len(missing) == 1 else "have no route")
        updates = {
            name: ParameterUpdate(name, wish, "as the user asked")
            if isinstance(wish := requested.get(name), Fixed)
            else ParameterUpdate(name, NoUpdate(), why)
            for name in self.parameters
        }
        return Plan(
            self.routes,
            updates,
            0 if self.cost is None else self.cost.cells,
            () if self.cost is None else self.cost.largest,
            False,
            observations_of(self.structure),
            self.structure.edges,
            self.structure.notes,
            kernel_reason="a latent has no route",
            obstacle=str(self.error),
            exact=False,
        )


def are_of_routes(problems: Sequence[Finding]) -> bool:
    """Whether findings are all about routes of latents, so that the model itself can be read."""
    return bool(problems) and all(p.latents for p in problems)


def without_route(
    structure: Structure,
    error: PyroEMError,
    *,
    guide: GuideLook | None = None,
    routes: Sequence[Route] = (),
    cost: ContractionPlan | None = None,
) -> Unrouted:
    """The rows of the plan of a model with such findings.

    Args:
        structure: The model's skeleton, without its guide.
        error: The exception that holds the findings.
        guide: What the guide's runs said, where it is not known yet what it is used for.
        routes: The rows as decided, where that was possible.
        cost: The enumeration, where it is past the budget.
    """
    of_guide = () if guide is None else tuple(guide.run.parameters)
    names = tuple(dict.fromkeys((*of_guide, *structure.parameters)))
    # Mostly nobody asks: Gaussian latents may be integrated.
    rows = LaterTuple(lambda: _rows(structure, error, guide, routes))
    return Unrouted(structure, rows, error, names, cost)


def _rows(
    structure: Structure, error: PyroEMError, guide: GuideLook | None, routes: Sequence[Route]
) -> tuple[Route, ...]:
    found: dict[str, Finding] = {}
    for problem in error.problems:
        for latent in problem.latents:
            found.setdefault(latent, problem)
    rows = []
    for route in routes or routes_of(structure):
        if route.site in found:
            problem = found[route.site]
            place = "" if f"'{route.site}'" in problem.where else f"{problem.where}: "
            reason = place + problem.what
            row = replace(route, route="none", reason=reason, finding=problem)
        elif not routes and route.route == "enumerate" and _has_no_sum(route, structure):
            row = _from_guide(route, structure, guide)
        else:
            row = route
        rows.append(row)
    return tuple(rows)


def _has_no_sum(route: Route, structure: Structure) -> bool:
    return route.size is None or route.site in structure.coupled


def _from_guide(route: Route, structure: Structure, guide: GuideLook | None) -> Route:
    """A latent that cannot be summed and that a guide covers."""
    if route.size is None:
        kind = "infinite support" if structure.sites[route.site].is_discrete else "continuous"
    else:
        kind = "elements of its plate read each other's"
    is_point = guide is not None and route.site in guide.points
    return replace(route, route="point estimate" if is_point else "guide", reason=kind)
