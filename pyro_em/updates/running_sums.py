"""Sums of a model's groups over rows, which are kept from batch to batch, and their M-step.

What an M-step asks of the data are functions of sums whose number does not grow with the rows:

    S_g = Σ_rows E_q[T_g],    E_q[log p] = Σ_g ℓ_g(S_g, θ),

of a Normal whose mean is a line those of `LineSums`, of another family its sufficient statistics. Both
are taken about a point, and are brought to another one exactly. Groups outside the plate of rows are
no sums over rows: they are read as they are, once.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pyro_em.distributions import bounds
from pyro_em.errors import Finding
from pyro_em.families.family import (
    Arguments,
    Statistics,
    expected_log_density,
    has_sums,
)
from pyro_em.families.student import about
from pyro_em.graph.binding import Binding
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.reduction.trees import SAME, added, mapped
from pyro_em.updates.closed_form import Blend, natural_values, solver_of
from pyro_em.updates.data_sums import DataSums, Evaluate
from pyro_em.updates.decision import groups_reached
from pyro_em.updates.line_sums import LineSite, LineSums
from pyro_em.updates.update import (
    ClosedForm,
    Fixed,
    LeastSquares,
    ParameterUpdate,
    at_other_rows,
)


@dataclass(frozen=True, eq=False)
class PlainSums:
    """Sufficient statistics of a group, summed.

    Attributes:
        sums: By name. # (members, *sizes or 1s, *event)
        references: The arguments about which deviations were taken.
    """

    sums: Statistics
    references: Arguments = field(metadata=SAME)

    def about(self, references: Arguments) -> PlainSums:
        """The same sums, deviations taken about other arguments.

        Example:
            >>> zero, two = torch.zeros(1), torch.full((1,), 2.0)
            >>> s = PlainSums({"deviation": zero, "square": two, "weight": two}, {"loc": zero})
            >>> s.about({"loc": torch.ones(1)}).sums["square"].item()  # x = ±1, about 1
            4.0
        """
        s = self.sums
        if "feature" in s and s["feature"].shape[-1] == 4 and "loc" in self.references:
            feature = about(s["feature"], references["loc"] - self.references["loc"])
            return PlainSums({**s, "feature": feature}, references)
        if "deviation" not in s:
            return PlainSums(s, references)
        step = references["loc"] - self.references["loc"]
        first, second, weight = s["deviation"], s["square"], s["weight"]
        if second.dim() > first.dim():
            each = weight[..., None, None]
            cross = first.unsqueeze(-1) * step.unsqueeze(-2)
            outer = step.unsqueeze(-1) * step.unsqueeze(-2)
            moved = second - cross - cross.mT + each * outer
            weight = weight.unsqueeze(-1)
        else:
            moved = second - 2 * step * first + weight * step**2
        return PlainSums({**s, "deviation": first - weight * step, "square": moved}, references)

    def named(self) -> Statistics:
        """The statistics together with their references, as rules read them."""
        return {**self.sums, **{f"reference:{n}": a for n, a in self.references.items()}}


GroupSums = PlainSums | LineSums
Differing = Mapping[int, frozenset[str]]


@dataclass(frozen=True, eq=False)
class ModelSums:
    """The sums of all groups that an M-step reads, over rows.

    Attributes:
        groups: By the number of the group.
        masses: Total expected counts, likewise.
        parameters: Of parameters whose arguments differ between rows, numerators and denominators of
            their closed forms, on their events.
    """

    groups: Mapping[int, GroupSums]
    masses: Mapping[int, float]
    parameters: Mapping[str, tuple[Tensor, Tensor]]

    def __add__(self, other: ModelSums) -> ModelSums:
        return added(self, other)

    def __mul__(self, factor: float) -> ModelSums:
        return mapped(self, lambda leaf: factor * leaf)

    __rmul__ = __mul__

    def about_those_of(self, other: ModelSums) -> ModelSums:
        """The same, each taken about the point of the other's."""
        moved: dict[int, GroupSums] = {}
        for g, own in self.groups.items():
            there = other.groups[g]
            if isinstance(own, PlainSums):
                assert isinstance(there, PlainSums)
                moved[g] = own.about(there.references)
            else:
                assert isinstance(there, LineSums)
                moved[g] = own.about(there.coefficients)
        return ModelSums(moved, self.masses, self.parameters)


@dataclass(frozen=True, eq=False)
class SummedDensity:
    """The expected log density of a group from its sums, in place of data; a `Belief`.

    Attributes:
        sums: The sums.
    """

    sums: PlainSums

    def expected_log_density(self, group: Group, arguments: Mapping[str, Tensor]) -> Tensor:
        """E_q[log p] of all cells together, up to a term free of the arguments, in nats. # ()"""
        assert group.family is not None
        wide = {n: _wide(a) for n, a in arguments.items()}
        return expected_log_density(group.family, self.sums.named(), wide)

    def statistics(self, group: Group, arguments: Mapping[str, Tensor]) -> Statistics:
        """The sums themselves."""
        return self.sums.named()


class RunningSums(DataSums):
    """What an M-step asks, answered from sums.

    Args:
        graph: Few rows stand for all in its groups.
        updates: What was decided per parameter, for these groups.
        counts: Expected counts per group.
        arguments: Arguments per group at the E-step.
        evaluate: From constrained values and group numbers to those groups' log densities.
        values: The parameters at the E-step.
        masses: Total expected counts per group.
        closed_forms: Numerators and denominators of closed forms, where these are kept.
    """

    def __init__(
        self,
        graph: FactorGraph,
        updates: Mapping[str, ParameterUpdate],
        counts: Sequence[Tensor],
        arguments: Sequence[Mapping[str, Tensor]],
        evaluate: Evaluate,
        values: Mapping[str, Tensor],
        masses: Sequence[float],
        closed_forms: Mapping[str, tuple[Tensor, Tensor]],
    ) -> None:
        super().__init__(graph, updates, counts, arguments, evaluate, values)
        self._masses, self._closed_forms = list(masses), closed_forms

    def masses(self) -> list[float]:
        """See `DataSums.masses`."""
        return self._masses

    def solved(self, name: str, blend: Blend | None = None) -> tuple[Tensor, list[int]]:
        """See `DataSums.solved`."""
        if name not in self._closed_forms:
            return super().solved(name, blend)
        value = self.values[name]
        solver = solver_of(self.updates[name], self.graph, value)
        return solver.maximiser(*self._closed_forms[name], value)

    def refuse_edges(self, groups: Sequence[int]) -> bool:
        """See `DataSums.refuse_edges`: data of sums are not at hand any more."""
        return super().refuse_edges([g for g in groups if self.graph.groups[g].belief is None])

    def expected_by(self, values: Mapping[str, Tensor], groups: Sequence[int]) -> float:
        """E_q[log p] of some groups, and of closed forms that are kept, in nats."""
        total = float(self.expected_log_joint(values, groups).detach()) if groups else 0.0
        for name, (n, d) in self._closed_forms.items():
            update = self.updates[name]
            assert update.kind is not None
            rows = values[name].detach().to(torch.float64).reshape(len(n), *n.shape[1:])
            total += float(update.kind.form.expected(n, d, natural_values(update, rows)))
        return total

    def _taken(self, groups: Iterable[int]) -> dict[int, Statistics]:
        groups = list(groups)
        for g in self.stale.intersection(groups):
            belief = self.graph.groups[g].belief
            if isinstance(belief, SummedDensity):
                self._statistics[g] = belief.sums.named()
                self.stale.discard(g)
        return super()._taken(groups)


@dataclass(frozen=True, eq=False)
class Summable:
    """Which groups of a graph are added up over rows, and how.

    Attributes:
        graph: That of an M-step, with moments of Gaussian latents where it is one of some rows.
        updates: What was decided per parameter.
        plain: Groups whose sufficient statistics are added.
        lines: Normal sites whose mean is a line, by the numbers of their groups.
        touched: All groups whose density an update changes, those apart that `solved` alone reach.
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
        """
        moved = {n for n, u in updates.items() if not isinstance(u.update, Fixed)}
        regressed = {n for n, u in updates.items() if isinstance(u.update, LeastSquares)}
        touched = groups_reached(graph, moved)
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
            references = {n: _wide(a.detach()) for n, a in data.arguments[g].items()}
            groups[g] = PlainSums(_of_one_form(data.statistics_of(g)), references)
        for g, site in self.lines.items():
            groups[g] = site.sums(data.arguments[g], data.counts[g], data.values)
        masses = {g: float(data.counts[g].sum()) for g in groups}
        parameters = {}
        for name in self.solved:
            n, d = data.closed(name)
            parameters[name] = _wide(n), _wide(d)
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


def marks_of(
    graph: FactorGraph, plate: str, outside: Collection[int]
) -> dict[int, dict[str, Tensor]]:
    """What tells whether rows share an argument: larger in another part, smaller, or the same there.

    Args:
        graph: That of an M-step.
        plate: The plate of rows.
        outside: Numbers of groups outside it.

    Returns:
        By group and argument whether it differs between the rows at hand, and a number that is the
        same for equal arguments. # (2,)
    """
    out: dict[int, dict[str, Tensor]] = {}
    for g, group in enumerate(graph.groups):
        if g in outside or group.family is None or plate not in group.dims[0]:
            continue
        outer = 1 + group.dims[0].index(plate)
        out[g] = {
            name: torch.tensor(
                [float(argument.shape[outer] > 1), _number(group.bindings[name], argument)],
                dtype=torch.float64,
            )
            for name, argument in group.arguments.items()
        }
    return out


def _number(binding: Binding, argument: Tensor) -> float:
    """A number of all that an argument is made of, which is another one for another argument."""
    constant = binding.constant
    for s in binding.selections:  # what is selected may stand in it, as it was when it was read
        constant = torch.where(s.index >= 0, torch.zeros_like(constant), constant)
    tensors = [constant, *(s.index for s in binding.selections)]
    tensors += [s.factor for s in binding.selections if s.factor is not None]
    tensors += [j.dense for j in binding.slopes]
    if not binding.is_static:
        tensors = [argument]
    total = 0.0
    for i, t in enumerate(tensors, start=1):
        flat = t.detach().reshape(-1).to("cpu", torch.float64)
        total += float(torch.dot(flat, torch.cos(i + torch.arange(len(flat)).double())))
    return total


def differing_arguments(
    high: Mapping[int, Mapping[str, Tensor]],
    low: Mapping[int, Mapping[str, Tensor]],
    graph: FactorGraph,
    rows: int,
) -> Differing:
    """The arguments that differ between rows.

    Args:
        high: The largest of what `marks_of` says of each part.
        low: The smallest.
        graph: That of one part.
        rows: Of how many rows the marks are; a single one may be another than all that follow.
    """
    out = {}
    for g, own in high.items():
        bindings = graph.groups[g].bindings
        names = set()
        for name, mark in own.items():
            first, last = float(mark[1]), float(low[g][name][1])
            other = abs(first - last) > 1e-9 * max(1.0, abs(first), abs(last))
            single = rows == 1 and bindings[name].how in ("affine", "bilinear", "opaque")
            if float(mark[0]) > 0 or other or single:
                names.add(name)
        if names.intersection(graph.groups[g].lines):  # a mean differs as a whole
            names.update(graph.groups[g].lines)
        out[g] = frozenset(names)
    return out


def _no_sums(group: Group, argument: str) -> Finding:
    site = group.members[0]
    return Finding(
        f"site '{site}'",
        f"what the rows say of {argument} of '{site}' ({group.distribution}) is no sum of one size: "
        "it needs the rows themselves",
    )


def _of_one_form(sums: Statistics) -> Statistics:
    """Sums in float64 with a weight for each entry, whether or not the entries of these rows differ."""
    wide = {n: _wide(t) for n, t in sums.items()}
    weight = wide["weight"]
    alike = [t.shape for t in wide.values() if t.dim() == weight.dim()]
    return {**wide, "weight": weight.expand(torch.broadcast_shapes(*alike))}


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.float64) if t.is_floating_point() else t
