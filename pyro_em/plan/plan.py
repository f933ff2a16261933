"""Plan: the decisions about a model, as a value that prints."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from pyro_em import html
from pyro_em.plan.cost import contraction_from_structure
from pyro_em.plan.routes import Observation, Route, observations_of, routes_with_guide
from pyro_em.plan.routing import reduced
from pyro_em.portable import Portable
from pyro_em.tracing.missing import Missing
from pyro_em.updates.update import (
    ClosedForm,
    Fixed,
    Gradient,
    LeastSquares,
    Newton,
    NewtonOnProfile,
    NewtonOnSums,
    NoUpdate,
    ParameterUpdate,
    Update,
)
from pyro_em.variational.bound import Variational, unused_parameters


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
        kernel: What iterates: "mixture", "chain", "contraction", "stochastic", or "none" where a
            latent has no route; of Gaussian latents "factor", "Kalman" (chains on sums over steps) or
            "Gaussian"; with several components of latents one for each.
        kernel_reason: Why no quicker kernel does; None where there is none. Of the same shape.
        iterations: What an iteration does, in words.
        missing: What is missing of observed sites, with ``missing="nan"``.
        exact: Whether each step is an exact E-step on all of the data: nothing is drawn, nothing given
            up, no batch stands for all.
    """

    routes: Sequence[Route]
    updates: Mapping[str, ParameterUpdate]
    cells: int
    largest: tuple[str, ...]
    compiled: bool
    observed: Sequence[Observation]
    edges: Sequence[tuple[str, str]]
    notes: tuple[str, ...] = ()
    stochastic: bool = False
    draws: bool = True
    is_monotone: bool = True
    gives_up: str = ""
    obstacle: str = ""
    kernel: str | Mapping[tuple[str, ...], str] = "none"
    kernel_reason: str | Mapping[tuple[str, ...], str | None] | None = None
    iterations: str = ""
    missing: Sequence[Missing] = ()
    exact: bool = True

    @property
    def graph(self) -> Any:
        """The model as a `ModelGraph`: edges from a site to the sites that use its value.

        Raises:
            ImportError: If networkx is not installed (``pip install pyro-em[graph]``).
        """
        from pyro_em.graph.independence import ModelGraph

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
        return "\n".join(str(part) for part in self._parts())

    def _repr_html_(self) -> str:
        return html.whole(
            *(
                part.html() if isinstance(part, _Section) else html.line(part)
                for part in self._parts()
            )
        )

    def _parts(self) -> list[str | _Section]:
        """What is shown, in order: tables and lines."""
        users = self._users_names()
        routes = tuple(
            r
            if users[r.site] == r.site
            else replace(r, site=users[r.site], reason=f"where missing: {r.reason}")
            for r in self.routes
        )
        parts: list[str | _Section] = [
            _Section(
                "Latents",
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
            _Section(
                "Parameters",
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
        else:
            parts.append(f"Iterations: {self.iterations}")
        if self.gives_up:
            parts.append(f"Strategy: {self.gives_up}")
        if self.missing:
            header = ("site", "missing", "entries", "treatment")
            parts.append(_Section("Missing entries", header, _missing_in_words(self.missing)))
        parts.extend(f"Note: {n}" for n in self.notes)
        return parts

    __repr__ = __str__

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))


@dataclass(frozen=True)
class _Section:
    """A table of a plan, with its name."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def __str__(self) -> str:
        return f"{self.title}\n{_table(self.header, self.rows)}"

    def html(self) -> str:
        shown = html.table(self.header, self.rows) if self.rows else html.line("none")
        return html.heading(self.title) + shown


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
        of_module = separator and isinstance(u.update, (Gradient, NoUpdate))
        own = module if of_module else u.name
        groups.setdefault((own, _update_name(u), u.reason), []).append(u)
    folded: list[tuple[str, ParameterUpdate]] = []
    for (own, _, _), members in groups.items():
        if len(members) < 4:
            folded.extend((u.name, u) for u in members)
        else:
            folded.append((f"{own} ({len(members)} parameters)", members[0]))
    return folded


def _missing_in_words(missing: Iterable[Missing]) -> list[tuple[str, ...]]:
    """Rows of the table of missing entries; the steps of a chain on one line."""
    groups: dict[tuple[str, bool], list[Missing]] = {}
    for m in missing:
        groups.setdefault((re.sub(r"\d+$", "*", m.site), m.whole), []).append(m)
    rows: list[tuple[str, ...]] = []
    for (glob, whole), members in groups.items():
        name = glob if len(members) > 1 else members[0].site
        entries, of = sum(m.entries for m in members), sum(m.of for m in members)
        said = "integrated out" + (", with the whole events that hold them" if whole else "")
        rows.append((name, f"{entries:,}", f"{of:,}", said))
    return rows


def _update_name(update: ParameterUpdate) -> str:
    match update.update:
        case ClosedForm(floor=floor):
            return "closed form" + (f", floor {floor:g}" if floor else "")
        case LeastSquares():
            others = [p for p in update.block if p != update.name]
            return "least squares" + (f" with {', '.join(others)}" if others else "")
        case NewtonOnProfile():
            return "Newton on sums"
        case NewtonOnSums():
            others = [p for p in update.block if p != update.name]
            return "Newton on sums" + (f" with {', '.join(others)}" if others else "")
        case Newton():
            others = [p for p in update.block if p != update.name]
            return "Newton" + (f" with {', '.join(others)}" if others else "")
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


def plan_of(variational: Variational, updates: Mapping[str, Update], has_optim: bool) -> Plan:
    """The decisions about a pair, as a value that prints."""
    look, bare = variational.routing.guide, variational.bare
    assert look is not None
    decided = {}
    of_guide = look.parameters(variational.parameters)
    unused = unused_parameters(variational.routing) if variational.routing.gaussian else ()
    for name in variational.parameters:
        wish = updates.get(name)
        whose = "guide" if name in of_guide else "model"
        if name in look.run.parameters and name in bare.parameters:
            whose = "guide and model (under Alternating it moves in the guide's turns)"
        if isinstance(wish, Fixed):
            decided[name] = ParameterUpdate(name, wish, "as the user asked")
        elif name in unused:
            why = "of the guide; what it belongs to has an exact posterior"
            decided[name] = ParameterUpdate(name, NoUpdate(), why)
        elif wish is not None:
            decided[name] = ParameterUpdate(name, wish, f"of the {whose}, as the user asked")
        else:
            kind = "guide's" if variational.is_exact else "drawn"
            reason = f"of the {whose}; gradient of the {kind} bound"
            decided[name] = ParameterUpdate(name, Gradient(torch.optim.Adam, 1), reason)  # type: ignore[arg-type]
    exact = variational.routing.exact
    routing = variational.routing
    cost = contraction_from_structure(
        reduced(bare, {*routing.drawn, *routing.points, *routing.gaussian})
    )
    notes = [] if has_optim else ["no optim was given: Adam with learning rate 0.005."]
    notes += variational.notes
    if variational.analytic and variational.weighted is None:
        names = ", ".join(f"'{n}'" for n in sorted(variational.analytic))
        notes.append(f"the KL divergence of {names} is taken in closed form.")
    return Plan(
        routes_with_guide(bare, variational.routing),
        decided,
        cost.cells if exact else 0,
        cost.largest if exact else (),
        False,
        observations_of(bare),
        bare.edges,
        tuple(notes),
        stochastic=True,
        kernel="stochastic",
        draws=not variational.is_exact,
        is_monotone=False,
        exact=False,
        gives_up=""
        if variational.weighted is None
        else f"MonteCarlo({variational.weighted}): raises the importance-weighted bound of "
        f"{variational.weighted} draws, not the ELBO.",
    )
