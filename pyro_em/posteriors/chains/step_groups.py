"""The groups of a chain that read the state of one step: their log densities, and their sums.

Inside, rows are steps before sequences: tables are (K, steps, B), so that sequences can be the fastest
dimension of memory. A group may read a part of the state only; K is then the size of that part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from pyro_em.densities.density import NormalRows
from pyro_em.densities.features import (
    Cells,
    Counted,
    Known,
    Lookup,
    as_lookup,
    cells,
    counted,
    known,
)
from pyro_em.densities.gaussian import Gaussian
from pyro_em.densities.layout import Layout
from pyro_em.densities.rules import rule_of
from pyro_em.densities.theta import At
from pyro_em.errors import Finding
from pyro_em.families.family import Statistics
from pyro_em.graph.bindings.binding import is_in_order
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.updates.expectations.statistics import Key, group_sums, known_statistics

_ALL = slice(None)


@dataclass(eq=False)
class StepGroups:
    """The groups of a chain beside its transitions.

    Attributes:
        graph: The collapsed graph.
        steps: Groups that read one state, and at which steps; None for 0, 1, 2, … to the last.
        sizes: How many values each of them reads.
        linear: Those of them that are linear and read rows.
        cells: Those of them that are linear and read no row, as an initial distribution.
        normals: Those of them that are Normal and evaluated by matrix products.
        others: Those of them that their family evaluates.
        known: Linear groups that read no state.
        free: Other groups that read none.
        plates: Sizes of the chain's plates.
        lanes: Whether sequences are to be the last dimension in memory.
        fixed: T(x) of groups whose family evaluates them, where no argument changes it.
        B: Sequences.
    """

    graph: FactorGraph
    steps: Mapping[int, Tensor | None]
    sizes: Mapping[int, int]
    linear: Mapping[int, Counted]
    cells: Mapping[int, Cells]
    normals: Mapping[int, NormalRows]
    others: tuple[int, ...]
    known: Mapping[int, Known]
    free: tuple[int, ...]
    plates: tuple[int, ...]
    lanes: bool
    fixed: Mapping[int, Statistics | None]
    lookups: Mapping[int, Lookup] = field(init=False)
    first: Mapping[int, bool] = field(init=False)
    base: float = field(init=False)
    B: int = field(init=False)

    @classmethod
    def of(
        cls,
        graph: FactorGraph,
        unary: Mapping[int, Sequence[int] | Tensor],
        free: Iterable[int],
        sizes: Mapping[int, int],
        layout: Layout,
        T: int,
        lanes: bool,
    ) -> Self | Finding:
        """The groups of a chain, or why one of them has no kernel.

        Args:
            graph: A collapsed graph; groups that read a state have one dimension for it.
            unary: Groups that read one state, and at which steps.
            free: Groups that read none.
            sizes: How many values each of the former reads.
            layout: How groups are evaluated.
            T: The number of steps.
            lanes: Whether sequences are to be the last dimension in memory.
        """
        groups, linears = graph.groups, layout.linears
        linear: dict[int, Counted] = {}
        tables: dict[int, Cells] = {}
        normals: dict[int, NormalRows] = {}
        steps: dict[int, Tensor | None] = {}
        others: list[int] = []
        for g, places in unary.items():
            K = sizes[g]
            steps[g] = _steps_read(places, T, groups[g].value.device)
            if g in linears and _reads_no_row(groups[g]):
                tables[g] = cells(groups[g], *linears[g])
            elif g in linears:
                part = counted(groups[g], *linears[g], K)
                if part is None:
                    site = groups[g].members[0]
                    what = f"the parameters of '{site}' differ from sequence to sequence: no kernel"
                    return Finding(f"site '{site}'", what)
                linear[g] = part
            elif g in layout.lines:
                normals[g] = layout.lines[g]
            elif (rule := rule_of(groups[g], K, graph.all_data)) is not None:
                normals[g] = rule
            else:
                others.append(g)
        free = tuple(free)
        first = next(iter(graph.latents.values()))
        return cls(
            graph,
            steps,
            sizes,
            linear,
            tables,
            normals,
            tuple(others),
            {g: known(groups[g], *linears[g]) for g in free if g in linears},
            tuple(g for g in free if g not in linears),
            tuple(graph.dim_size(p) for p in first.plates),
            lanes,
            {g: known_statistics(groups[g]) for g in others},
        )

    def __post_init__(self) -> None:
        self.B = math.prod(self.plates)
        self.first = {
            g: s is not None and len(s) == 1 and int(s) == 0 for g, s in self.steps.items()
        }
        found = {} if self.lanes else {g: as_lookup(part) for g, part in self.linear.items()}
        self.lookups = {g: lookup for g, lookup in found.items() if lookup is not None}
        self.linear = {
            g: part if g in self.lookups else part.laid_out() for g, part in self.linear.items()
        }
        self.base = sum(k.base for k in self.known.values())
        self.base += sum(float(c.base.sum()) for c in self.linear.values())

    @property
    def columns(self) -> list[Tensor]:
        """The elements of η, in the order of what `sums` collects for them."""
        parts = [c.columns for c in self.cells.values()]
        parts += [c.columns.reshape(-1) for c in self.linear.values()]
        return parts + [k.columns for k in self.known.values()]

    def features(self, at: At) -> dict[int, Any]:
        """What both halves of the E-step need of Normal groups."""
        return {g: rule.features(_ALL, at.prepared[g]) for g, rule in self.normals.items()}

    def tables(self, at: At, features: Mapping[int, Any]) -> list[tuple[int, Tensor]]:
        """Log densities, groups that cover every step first. # (K, steps or 1, B or 1) each"""
        tables: list[tuple[int, Tensor]] = []
        for g, part in self.linear.items():
            lookup, K = self.lookups.get(g), self.sizes[g]
            if lookup is None:
                table = self._product(at.eta.take(part.columns), part.phi)
            else:
                table = lookup.rows(lookup.table(at.eta))
                table = table.reshape(-1, self.B, K).permute(2, 0, 1)
            tables.append((g, table))
        for g, rule in self.normals.items():
            table = rule.log_density(at.prepared[g], features[g])
            tables.append((g, self._masked(g, table.reshape(self.sizes[g], -1, self.B))))
        for g in self.others:
            group = self.graph.groups[g]
            table = group.log_density(at.arguments[g])
            table = table.reshape(len(group.members), -1, self.sizes[g])
            tables.append((g, table.permute(2, 0, 1).clone()))
        for g, cell in self.cells.items():  # a latent's own: a mask is for its counts alone
            tables.append((g, cell.table(at.eta).reshape(-1, 1, 1)))
        return sorted(tables, key=lambda pair: self.steps[pair[0]] is not None)

    def add(self, out: Tensor | None, g: int, table: Tensor, T: int) -> Tensor:
        """Add a group's table at the steps of the group.

        Args:
            out: What is there; None where nothing is yet. # (K, T, B)
            g: The group.
            table: # (K, steps or 1, B or 1)
            T: The number of steps.
        """
        steps, shape = self.steps[g], (table.shape[0], T, self.B)
        if steps is None:
            table = table.to(torch.float64)
            if out is not None:
                return out + table
            return table if table.shape == shape else table.expand(shape).contiguous()
        if out is None:
            out = torch.zeros(shape, dtype=torch.float64, device=table.device)
        if self.first[g]:  # an initial distribution
            out[:, :1] += table
        else:
            out.index_add_(1, steps, table.to(out.dtype).expand(-1, len(steps), self.B))
        return out

    def sums(
        self,
        at: At,
        features: Mapping[int, Any],
        mass: Callable[[int], Tensor],
        sums: dict[Key, Statistics],
    ) -> tuple[list[Tensor], Tensor | float]:
        """Collect the sums of all groups.

        Args:
            at: The parameters.
            features: Of Normal groups.
            mass: Gives posterior masses of what a group reads, at all steps. # (K, T, B)
            sums: Where the sums of groups that are not linear go.

        Returns:
            The counts of linear groups, as `columns` has them, and what the log evidence gains.
        """
        groups, entries = self.graph.groups, []
        gain: Tensor | float = 0.0
        for g, table in self.cells.items():
            weights = self._at_steps(mass(g), g)
            if groups[g].mask is not None:
                weights = weights * mask_of(groups[g])
            entries.append(table.counts(weights.sum((1, 2))))
        for g, part in self.linear.items():
            weights, K = self._at_steps(mass(g), g), self.sizes[g]
            if g in self.lookups:
                entries.append(self.lookups[g].counts(weights.permute(1, 2, 0).reshape(-1, K)))
            else:
                entries.append((weights.reshape(K, -1) @ part.phi.T).reshape(-1))
        for g, rule in self.normals.items():
            weights = self._at_steps(mass(g), g)
            if groups[g].mask is not None:
                weights = weights * mask_of(groups[g])
            weights = weights.reshape(self.sizes[g], -1)
            if isinstance(rule, Gaussian):
                weights = weights.to(rule.x.dtype)
            total = weights.sum(1, dtype=torch.float64)
            moments = rule.moments(at.prepared[g], weights, features[g])
            sums[g] = {"moments": rule.over_rows(at.prepared[g], moments), "mass": total}
            gain = gain + rule.correction(at.prepared[g], moments, total)
        for g in self.others:
            sums[g] = self._counted(g, self._at_steps(mass(g), g), at.arguments[g])
        for k in self.known.values():
            gain = gain + torch.dot(k.f, at.eta.take(k.columns))
            entries.append(k.f)
        for g in self.free:
            table = groups[g].log_density(at.arguments[g]).to(torch.float64)
            gain = gain + table.sum()
            sums[g] = group_sums(groups[g], torch.ones_like(table), at.arguments[g])
        return entries, gain

    def _at_steps(self, mass: Tensor, g: int) -> Tensor:
        """Masses at the steps of a group. # (K, steps, B)"""
        steps = self.steps[g]
        if self.first[g]:
            return mass[:, :1]
        return mass if steps is None else mass[:, steps]

    def _product(self, theta: Tensor, phi: Tensor) -> Tensor:
        """Θ Φ; what is last in memory is what smoothing wants there. # (K, steps, B)"""
        if self.lanes:
            return (theta @ phi).reshape(len(theta), -1, self.B)
        return (phi.T @ theta.T).reshape(-1, self.B, len(theta)).permute(2, 0, 1)

    def _counted(self, g: int, weights: Tensor, arguments: Mapping[str, Tensor]) -> Statistics:
        group = self.graph.groups[g]
        counts = weights.permute(1, 2, 0)  # (members, B, K)
        if group.n_plates == 0:
            counts = counts.sum(1)
        else:
            counts = counts.reshape(-1, *self.plates, self.sizes[g])
        return group_sums(group, counts, arguments, self.fixed[g])

    def _masked(self, g: int, table: Tensor) -> Tensor:
        """Zero where a group does not count. # (K, members or 1, B or 1)"""
        if self.graph.groups[g].mask is None:
            return table
        return torch.where(mask_of(self.graph.groups[g]), table, 0.0)


def _steps_read(places: Sequence[int] | Tensor, T: int, device: torch.device) -> Tensor | None:
    """At which steps members read a state; None for 0, 1, 2, … to the last."""
    if isinstance(places, range):
        every = range(T)
        at = None if places == every else torch.arange(places.start, places.stop, device=device)
        return at
    at = torch.as_tensor(places, device=device)
    return None if len(at) == T and is_in_order(at) else at


def mask_of(group: Group) -> Tensor:
    """Where a group counts. # (members or 1, B or 1)"""
    assert group.mask is not None
    return group.mask.reshape(group.mask.shape[0], -1)


def _reads_no_row(group: Group) -> bool:
    """Whether the group is one table of the state, the same for all steps and sequences."""
    tensors = [group.value, *group.arguments.values()]
    same = all(n == 1 for t in tensors for n in t.shape[: 1 + group.n_plates])
    return same and not group.observed
