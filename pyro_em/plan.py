"""Plan: the decisions about a model, as a value that prints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pyro_em._errors import Problem
from pyro_em._portable import Portable
from pyro_em._pyro import Role
from pyro_em.advice import sites_in_words
from pyro_em.contraction import ContractionPlan, plan_contraction
from pyro_em.m_step import ClosedForm, Fixed, Gradient, LeastSquares, NoUpdate, ParameterUpdate
from pyro_em.structure import Structure


@dataclass(frozen=True)
class Route:
    """How one unobserved site is treated, and why.

    Attributes:
        site: The site's name.
        distribution: Its distribution.
        route: ``"enumerate"``, ``"integrates to one"``, ``"point estimate"``, ``"guide"``, or
            ``"none"`` where there is none; everything but a plan then raises.
        size: Number of values summed over, or None.
        plates: Its plates.
        reason: Why, in words.
        finding: What leaves it without a route, with the fixes to try; else None.
    """

    site: str
    distribution: str
    route: str
    size: int | None
    plates: tuple[str, ...]
    reason: str
    finding: Problem | None = None


@dataclass(frozen=True)
class Observation:
    """One observed site: its name, the name of its distribution, its plates left to right."""

    site: str
    distribution: str
    plates: tuple[str, ...]


@dataclass(frozen=True, repr=False)
class Plan(Portable):
    """Routes, updates, reasons and cost; ``print(plan)`` shows them as tables.

    Attributes:
        routes: One per unobserved site.
        updates: One per parameter.
        cells: Cells of the contraction's largest tensor.
        largest: The names of its dimensions.
        compiled: Whether iterations run without the Python model.
        observed: The observed sites.
        edges: Pairs (parent, child) of the model's directed graph.
        notes: Warnings in words.
        stochastic: Whether steps follow gradients of a bound of the guide.
        draws: Whether that bound is drawn; not where everything is summed under the guide.
        is_monotone: Whether the objective can never fall by more than rounding.
        gives_up: What the strategy does without, in words.
        obstacle: Where a latent has no route, what everything but a plan raises; else empty.
    """

    routes: tuple[Route, ...]
    updates: Mapping[str, ParameterUpdate]
    cells: int
    largest: tuple[str, ...]
    compiled: bool
    observed: tuple[Observation, ...]
    edges: tuple[tuple[str, str], ...]
    notes: tuple[str, ...] = ()
    stochastic: bool = False
    draws: bool = True
    is_monotone: bool = True
    gives_up: str = ""
    obstacle: str = ""

    @property
    def graph(self) -> Any:
        """The model as a `ModelGraph`: edges from a site to the sites that use its value.

        Raises:
            ImportError: If networkx is not installed (``pip install pyro-em[graph]``).
        """
        from pyro_em.model_graph import ModelGraph

        name = self._users_names()
        graph = ModelGraph()
        for r in self.routes:
            partly = name[r.site] != r.site
            graph.add_node(
                name[r.site], observed=False, partly=partly, kind="site", plates=r.plates
            )
        for o in self.observed:
            kind = "factor" if o.distribution == "Unit" else "site"
            if name[o.site] == o.site:
                graph.add_node(o.site, observed=True, kind=kind, plates=o.plates)
        graph.add_edges_from((name[a], name[b]) for a, b in self.edges if name[a] != name[b])
        return graph

    def _users_names(self) -> dict[str, str]:
        """The two parts of an ``obs_mask`` site have one name in the model."""
        seen = [o.site for o in self.observed]
        name = {n: n for n in (*(r.site for r in self.routes), *seen)}
        for stem in [n.removesuffix("_observed") for n in seen if n.endswith("_observed")]:
            if f"{stem}_unobserved" in name:
                name[f"{stem}_observed"] = name[f"{stem}_unobserved"] = stem
        return name

    def __str__(self) -> str:
        users = self._users_names()
        routes = tuple(
            r
            if users[r.site] == r.site
            else replace(r, site=users[r.site], reason=f"where missing: {r.reason}")
            for r in self.routes
        )
        parts = [
            "Latents",
            _table(
                ("site", "distribution", "plates", "route", "reason"),
                [
                    (
                        name,
                        r.distribution if r.size is None else f"{r.distribution} ({r.size})",
                        ", ".join(r.plates) or "-",
                        r.route,
                        r.reason,
                    )
                    for name, r in _folded(routes)
                ],
            ),
            "Parameters",
            _table(
                ("parameter", "update", "reason"),
                [
                    (name, _update_name(u), u.reason)
                    for name, u in _folded_updates(self.updates.values())
                ],
            ),
        ]
        if self.largest or not (self.stochastic or self.obstacle):
            shown = [users.get(d, d) for d in self.largest]
            if len(shown) > 8:
                shown = [*shown[:6], f"{len(shown) - 6} more"]
            dims = " x ".join(shown) or "1"
            size = f"{self.cells:,}" if self.cells < 10**15 else f"{self.cells:.3g}"
            has = "would have" if self.obstacle else "has"
            parts.append(f"Cost: the largest table {has} {size} cells ({dims}).")
        if self.obstacle:
            parts.append("Iterations: none. A fit, a step, a posterior and a bound raise:")
            parts.append("\n".join(f"  {line}" for line in self.obstacle.splitlines()))
        elif self.stochastic and self.draws:
            parts.append("Iterations: stochastic, each draws from the guide.")
        elif self.stochastic:
            parts.append(
                "Iterations: gradient steps; latents are summed under the guide, no draws."
            )
        elif self.compiled:
            parts.append("Iterations: compiled, the model is not run again.")
        else:
            parts.append("Iterations: the model is run again at each (generic path).")
        if self.gives_up:
            parts.append(f"Strategy: {self.gives_up}")
        parts.extend(f"Note: {n}" for n in self.notes)
        return "\n".join(parts)

    __repr__ = __str__

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))


def _folded(routes: tuple[Route, ...]) -> list[tuple[str, Route]]:
    """The steps of a chain on one line: z_0 … z_99 (100)."""
    groups: dict[tuple[Any, ...], list[Route]] = {}
    for r in routes:
        stem = r.site.rstrip("0123456789")
        numbered = stem != r.site
        key = (stem if numbered else r.site, numbered, r.distribution, r.route, r.size, r.plates)
        groups.setdefault(key, []).append(r)
    folded: list[tuple[str, Route]] = []
    for members in groups.values():
        if len(members) < 4:
            folded.extend((r.site, r) for r in members)
        else:
            name = f"{members[0].site} … {members[-1].site} ({len(members)} sites)"
            folded.append((name, members[0]))
    return folded


def _folded_updates(updates: Iterable[ParameterUpdate]) -> list[tuple[str, ParameterUpdate]]:
    """The parameters of a network on one line: encoder (6 parameters)."""
    groups: dict[tuple[Any, ...], list[ParameterUpdate]] = {}
    for u in updates:
        module, separator, _ = u.name.replace("$$$", ".").partition(".")
        own = module if separator and isinstance(u.update, Gradient) else u.name
        groups.setdefault((own, _update_name(u), u.reason), []).append(u)
    folded: list[tuple[str, ParameterUpdate]] = []
    for (own, _, _), members in groups.items():
        if len(members) < 4:
            folded.extend((u.name, u) for u in members)
        else:
            folded.append((f"{own} ({len(members)} parameters)", members[0]))
    return folded


def _update_name(update: ParameterUpdate) -> str:
    match update.update:
        case ClosedForm(floor=floor):
            return "closed form" + (f", floor {floor:g}" if floor else "")
        case LeastSquares():
            others = [p for p in update.block if p != update.name]
            return "least squares" + (f" with {', '.join(others)}" if others else "")
        case Gradient(optimizer=None):
            return "gradient (L-BFGS)"
        case Gradient(steps=1):
            return "gradient (optimiser)"
        case Gradient(steps=steps):
            return f"gradient ({steps} optimiser steps)"
        case Fixed():
            return "fixed"
        case NoUpdate():
            return "none"


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    if not rows:
        return "  none"
    widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]
    lines = [
        "  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    ]
    return "\n".join(lines)


def contraction_from_structure(structure: Structure) -> ContractionPlan:
    """The elimination order and its cost, before anything is enumerated."""
    infos = list(structure.sites.values())
    latents = {name: structure.sites[name] for name in structure.latents}
    sizes = {p: plate.size for p, plate in structure.plates.items()}
    sizes.update({name: info.support_size or 1 for name, info in latents.items()})
    return plan_contraction(
        [info.plates + info.scope for info in infos],
        {name: info.plates for name, info in latents.items()},
        sizes,
        own_latent=[None if i.observed else i.name for i in infos],
    )


def budget_problems(structure: Structure, plan: ContractionPlan, limit: int) -> list[Problem]:
    """An enumeration past the budget, with the size of its largest table."""
    if plan.cells <= limit:
        return []
    latents = [d for d in plan.largest if d in structure.latents]
    size = f"{plan.cells:,}" if plan.cells < 10**15 else f"{plan.cells:.3g}"
    coupling = [i.name for i in structure.sites.values() if len(set(i.scope) & set(latents)) > 2]
    why = f"{len(latents)} latents meet in one table"
    if coupling:
        why += f", coupled by site '{coupling[0]}'"
    return [
        Problem(
            sites_in_words(latents),
            f"enumerating them needs a table of {size} cells; the budget is "
            f"max_enumeration={limit:,}.",
            why,
            (
                "let each observation depend on fewer latents",
                "give a guide that takes them over: ExactPosteriorEM(model, guide)",
                "pass a larger max_enumeration if memory allows (8 bytes a cell, a few copies)",
                "fit a subset of the data",
            ),
            latents=tuple(latents),
        )
    ]


def routes_of(structure: Structure) -> tuple[Route, ...]:
    """The route of every unobserved site."""
    routes = []
    for name in structure.latents:
        info = structure.sites[name]
        routes.append(
            Route(
                name,
                info.distribution,
                "enumerate",
                info.support_size,
                info.plates,
                "finite support, exact sum",
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
