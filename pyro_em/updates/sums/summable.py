"""Which groups of a graph are added up over rows in sums of one size, and how; or why no sums hold
what they say.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_em.distributions import bounds
from pyro_em.errors import Finding
from pyro_em.families.family import has_sums
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.updates.decisions.decision import groups_reached
from pyro_em.updates.expectations.statistics import as_float64
from pyro_em.updates.regressions.line_sums import LineSite
from pyro_em.updates.sums.data_sums import DataSums
from pyro_em.updates.sums.differing import Differing
from pyro_em.updates.sums.model_sums import (
    GroupSums,
    ModelSums,
    PlainSums,
    SummedDensity,
    of_one_form,
)
from pyro_em.updates.sums.running_sums import RunningSums
from pyro_em.updates.update import ClosedForm, Fixed, LeastSquares, ParameterUpdate, at_other_rows


@dataclass(frozen=True, eq=False)
class Summable:
    """Which groups of a graph are added up over rows, and how.

    Attributes:
        graph: That of an M-step, with moments of Gaussian latents where it is one of some rows.
        updates: What was decided per parameter.
        plain: Groups whose sufficient statistics are added.
        lines: Normal sites whose mean is a line, by the numbers of their groups.
        touched: All groups whose density an update changes, or that an M-step reads, those apart that
            `solved` alone reach.
        solved: Parameters whose arguments differ between rows, and whose closed forms are sums still.
    """

    graph: FactorGraph
    updates: Mapping[str, ParameterUpdate]
    plain: tuple[int, ...]
    lines: Mapping[int, LineSite]
    touched: tuple[int, ...]
    solved: tuple[str, ...]

    @classmethod
    def of(
        cls,
        graph: FactorGraph,
        updates: Mapping[str, ParameterUpdate],
        plate: str,
        outside: Collection[int],
        values: Mapping[str, Tensor],
        differing: Differing,
        may_lack: bool = False,
        beside: Collection[int] = (),
    ) -> Summable | Finding:
        """How a graph's rows are added up, or why sums of one size do not hold what they say.

        Args:
            graph: That of an M-step.
            updates: What was decided per parameter.
            plate: The plate of rows.
            outside: Numbers of groups outside it.
            values: The parameters, for their sizes.
            differing: By the number of a group its arguments that differ between rows.
            may_lack: Whether other rows may lack entries that all of these have.
            beside: Numbers of groups that an M-step reads though no update changes them.
        """
        moved = {n for n, u in updates.items() if not isinstance(u.update, Fixed)}
        regressed = {n for n, u in updates.items() if isinstance(u.update, LeastSquares)}
        touched = tuple(dict.fromkeys((*groups_reached(graph, moved), *beside)))
        plain, lines, alone = [], {}, dict[int, str]()
        for g in touched:
            if g in outside:
                continue
            group = graph.groups[g]
            own = differing.get(g, frozenset())
            varying = next((a for a in group.arguments if a in own), None)
            if _has_one_form(group, moved):
                argument = next(a for a, b in group.bindings.items() if moved & set(b.params))
                if varying is not None:
                    alone[g] = argument
                else:
                    plain.append(g)
                continue
            found = _obstacle(group, moved)
            if found is not None:
                return found
            if _is_line(group, bool(own), regressed):
                site = LineSite.of(group, plate, values, own, may_lack)
                if isinstance(site, Finding):
                    return site
                lines[g] = site
            elif varying is not None:
                return _no_sums(group, varying)
            else:
                plain.append(g)
        solved = _reaching(graph, alone) & moved
        for name in solved:  # all that reads them goes with them
            alone |= {u.group: u.argument for u in updates[name].uses if u.group in plain}
        solved = _reaching(graph, alone) & moved
        for g, argument in alone.items():
            for name in moved.intersection(graph.groups[g].bindings[argument].params):
                uses = updates[name].uses
                is_closed = isinstance(updates[name].update, ClosedForm)
                if not is_closed or any(u.group not in alone for u in uses):
                    return _no_sums(graph.groups[g], argument)
        plain = [g for g in plain if g not in alone]
        regressed_now = dict(updates)
        for g, site in lines.items():
            for name in site.sizes if site.sizes else ():
                update = updates[name]
                if not update.uses:
                    continue
                others = [u for u in update.uses if u.group not in lines or u.argument != "loc"]
                if others or bounds(graph.parameters[name].constraint) != (-math.inf, math.inf):
                    return _no_sums(graph.groups[g], "loc")
                regressed_now[name] = replace(update, update=LeastSquares(), uses=(), block=(name,))
        rest = tuple(g for g in touched if g not in alone)
        return cls(graph, regressed_now, tuple(plain), lines, rest, tuple(sorted(solved)))

    def on(self, graph: FactorGraph, updates: Mapping[str, ParameterUpdate]) -> Summable:
        """The same for other rows: what is added up how does not depend on how many they are.

        Args:
            graph: Theirs, in an M-step.
            updates: What was decided per parameter, for that graph.
        """
        lines = {g: replace(site, group=graph.groups[g]) for g, site in self.lines.items()}
        regressed = {n: u for n, u in self.updates.items() if isinstance(u.update, LeastSquares)}
        return replace(self, graph=graph, updates={**updates, **regressed}, lines=lines)

    def sums(self, data: DataSums) -> ModelSums:
        """The sums of the rows at hand.

        Args:
            data: What the rows say after an E-step.
        """
        groups: dict[int, GroupSums] = {}
        for g in self.plain:
            references = {n: as_float64(a.detach()) for n, a in data.arguments[g].items()}
            groups[g] = PlainSums(of_one_form(data.statistics_of(g)), references)
        for g, site in self.lines.items():
            groups[g] = site.sums(data.arguments[g], data.counts[g], data.values)
        masses = {g: float(data.counts[g].sum()) for g in groups}
        parameters = {}
        for name in self.solved:
            n, d = data.closed(name)
            parameters[name] = as_float64(n), as_float64(d)
        return ModelSums(groups, masses, parameters)

    def standing_for(self, sums: ModelSums, data: DataSums) -> tuple[FactorGraph, RunningSums]:
        """What takes the place of the rows in an M-step.

        Args:
            sums: The sums of all rows.
            data: What some rows say, for what is outside of all of them.
        """
        groups, counts = list(self.graph.groups), list(data.counts)
        arguments = [dict(a) for a in data.arguments]
        masses = [0.0] * len(groups)
        for g in self.touched:
            masses[g] = sums.masses.get(g, 0.0) if g in sums.groups else float(counts[g].sum())
        for g, own in sums.groups.items():
            if isinstance(own, PlainSums):
                groups[g] = replace(groups[g], belief=SummedDensity(own))
                counts[g] = torch.ones((), dtype=torch.float64, device=counts[g].device)
            else:
                groups[g], counts[g] = self.lines[g].standing_for(own)
                arguments[g] = groups[g].evaluate_arguments(data.values)
        graph = replace(self.graph, groups=tuple(groups))
        updates = at_other_rows(self.updates, graph)
        return graph, RunningSums(
            graph,
            updates,
            counts,
            arguments,
            data.evaluate,
            data.values,
            masses,
            sums.parameters,
        )


def _obstacle(group: Group, moved: set[str]) -> Finding | None:
    """Why a group has no sums of one size, whatever its rows are; None where nothing is in the way."""
    site, family = group.members[0], group.family
    where = f"site '{site}'"
    if family is None:
        return Finding(where, f"the density of '{site}' ({group.distribution}) has no known sums")
    if group.value_binding is not None:
        return Finding(where, f"the value of '{site}' depends on a parameter")
    for argument, binding in group.bindings.items():
        natural = () if family.natural is None else family.natural.arguments
        known = (*family.rules, *natural, *group.lines)
        if moved.intersection(binding.params) and argument not in known:
            return _no_sums(group, argument)
        if family.natural is not None and family.natural.of_counts:
            return _no_sums(group, argument)  # how many there are follows from the largest count
    if not has_sums(family, group.arguments) or family.is_local:
        return Finding(
            where, f"what the rows say of '{site}' ({group.distribution}) is no single sum"
        )
    return None


def _reaching(graph: FactorGraph, arguments: Mapping[int, str]) -> set[str]:
    """The parameters that reach one argument of some groups."""
    return {n for g, a in arguments.items() for n in graph.groups[g].bindings[a].params}


def _has_one_form(group: Group, moved: set[str]) -> bool:
    """Whether a closed form of one argument is all that updates change of a group, whatever it is."""
    family = group.family
    if family is None or group.value_binding is not None or group.lines:
        return False
    if family.natural is not None:
        return False
    reached = [a for a, b in group.bindings.items() if moved.intersection(b.params)]
    if len(reached) != 1 or reached[0] not in family.rules:
        return False
    kind = family.rules[reached[0]].kind
    return kind.is_whole and not kind.is_spread and group.bindings[reached[0]].is_static


def _is_line(group: Group, differs: bool, regressed: set[str]) -> bool:
    """Whether a group's sums are those of a line rather than of its sufficient statistics."""
    assert group.family is not None
    if group.lines or regressed.intersection(group.mean_params):
        return True
    return group.family.name == "Normal" and differs


def _no_sums(group: Group, argument: str) -> Finding:
    site = group.members[0]
    return Finding(
        f"site '{site}'",
        f"what the rows say of {argument} of '{site}' ({group.distribution}) is no sum of one size: "
        "it needs the rows themselves",
    )
