"""The E-step of a homogeneous hidden Markov chain by forward and backward messages.

A graph is a chain if its latents z_0, z_1, … share their plates, one group of equal tables couples
each to the next, and every other factor reads at most one of them. With γ_t = α_t β_t and

    ξ(i, j) = Σ_t α_{t−1}(i) A(i, j) ℓ_t(j) β_t(j) / c_t ,

γ and ξ are the posterior marginals and the expected transitions (Rabiner 1989, eqs. 27 and 37).

Inside, rows are steps before sequences: tables are (K, T, B), so that sequences can be the fastest
dimension of memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from pyro_em.densities.density import NormalRows, checked, scattered
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
from pyro_em.densities.gaussian import Gaussian, as_gaussian
from pyro_em.densities.layout import Layout
from pyro_em.densities.theta import At, Theta
from pyro_em.densities.with_missing import as_incomplete
from pyro_em.errors import Finding
from pyro_em.families.family import Statistics
from pyro_em.graph.binding import is_in_order
from pyro_em.graph.factors import FactorGraph, Group, Latent
from pyro_em.posteriors.block import Component, Values
from pyro_em.posteriors.chain_shape import Shape, shape_of_chain, why_no_chain
from pyro_em.posteriors.forward_backward import smooth, wants_lanes
from pyro_em.posteriors.per_sequence import PerSequence
from pyro_em.posteriors.quick import Outline, QuickBlock
from pyro_em.updates.statistics import NATURAL, Expectation, group_sums, known_statistics

_ALL = slice(None)


@dataclass(eq=False)
class Chain(QuickBlock):
    """The chain that a graph is.

    Attributes:
        graph: The collapsed graph.
        couples: The group of transitions.
        transitions: Their table, where they are linear.
        steps: Groups that read one state, and at which steps; None for 0, 1, 2, … to the last.
        linear: Those of them that are linear and read rows.
        cells: Those of them that are linear and read no row, as an initial distribution.
        normals: Those of them that are Normal and evaluated by matrix products.
        others: Those of them that their family evaluates.
        known: Linear groups that read no state.
        free: Other groups that read none.
        plates: Sizes of the chain's plates.
        T: Its length.
        K: Its number of states.
        fixed: T(x) of groups whose family evaluates them, where no argument changes it.
    """

    graph: FactorGraph
    couples: int
    transitions: Cells | None
    steps: Mapping[int, Tensor | None]
    linear: Mapping[int, Counted]
    cells: Mapping[int, Cells]
    normals: Mapping[int, NormalRows]
    others: tuple[int, ...]
    known: Mapping[int, Known]
    free: tuple[int, ...]
    plates: tuple[int, ...]
    T: int
    K: int
    fixed: Mapping[int, Statistics | None]
    component: Component = field(init=False)
    theta: Theta = field(init=False)
    columns: Tensor = field(init=False)
    base: float = field(init=False)
    lanes: bool = field(init=False)
    lookups: Mapping[int, Lookup] = field(init=False)
    symbols: Lookup | None = field(init=False)
    first: Mapping[int, bool] = field(init=False)

    name: ClassVar[str] = "chain"
    words: ClassVar[str] = "chain kernel, by forward and backward messages"

    @classmethod
    def glance(cls, latents: Mapping[str, Latent]) -> Finding | None:
        """See `pyro_em.posteriors.quick.QuickBlock.glance`."""
        return why_no_chain(latents)

    @classmethod
    def outline(cls, component: Component) -> Outline[Self] | Finding:
        """See `pyro_em.posteriors.quick.QuickBlock.outline`."""
        graph = component.graph
        shape = shape_of_chain(graph)
        if isinstance(shape, Finding):
            return shape
        if not all(group.is_unscaled for group in graph.groups):
            return Finding("poutine.scale", "weights on a chain: no kernel")
        return Outline(graph, shape.eligible(graph), partial(cls.of, graph, shape))

    @classmethod
    def of(cls, graph: FactorGraph, shape: Shape, layout: Layout) -> Self | Finding:
        """The kernel of a chain, still without its parameters, or why there is none.

        Args:
            graph: A collapsed graph.
            shape: Its shape.
            layout: How its groups are evaluated.
        """
        groups = graph.groups
        linears, lines = layout.linears, layout.lines
        first = next(iter(graph.latents.values()))
        T, K = len(graph.latents), first.size
        linear: dict[int, Counted] = {}
        tables: dict[int, Cells] = {}
        normals: dict[int, NormalRows] = {}
        steps: dict[int, Tensor | None] = {}
        others: list[int] = []
        for g, places in shape.unary.items():
            at = torch.as_tensor(places, device=groups[g].value.device)
            steps[g] = None if len(at) == T and is_in_order(at) else at
            if g in linears and _reads_no_row(groups[g]):
                tables[g] = cells(groups[g], *linears[g])
            elif g in linears:
                part = counted(groups[g], *linears[g], K, members_are_rows=True)
                if part is None:
                    site = groups[g].members[0]
                    what = f"the parameters of '{site}' differ from sequence to sequence: no kernel"
                    return Finding(f"site '{site}'", what)
                linear[g] = part
            elif g in lines:
                normals[g] = lines[g]
            elif (
                rule := as_gaussian(groups[g], K, graph.all_data)
                or as_incomplete(groups[g], K, graph.all_data)
            ) is not None:
                normals[g] = rule
            else:
                others.append(g)
        couples = shape.couples
        is_linear = couples in linears
        return cls(
            graph,
            couples,
            cells(groups[couples], *linears[couples]) if is_linear else None,
            steps,
            linear,
            tables,
            normals,
            tuple(others),
            {g: known(groups[g], *linears[g]) for g in shape.free if g in linears},
            tuple(g for g in shape.free if g not in linears),
            tuple(graph.dim_size(p) for p in first.plates),
            T,
            K,
            {g: known_statistics(groups[g]) for g in [*others, *([] if is_linear else [couples])]},
        )

    def __post_init__(self) -> None:
        parts = [c.columns for c in self.cells.values()]
        parts += [c.columns.reshape(-1) for c in self.linear.values()]
        parts += [] if self.transitions is None else [self.transitions.columns]
        parts += [k.columns for k in self.known.values()]
        device = self.graph.groups[0].value.device
        self.columns = torch.cat([torch.empty(0, dtype=torch.long, device=device), *parts])
        self.lanes = wants_lanes(self.B, self.K, device)
        self.first = {
            g: s is not None and len(s) == 1 and int(s) == 0 for g, s in self.steps.items()
        }
        found = {} if self.lanes else {g: as_lookup(part) for g, part in self.linear.items()}
        self.lookups = {g: lookup for g, lookup in found.items() if lookup is not None}
        self.symbols = self._only_symbols()
        self.base = sum(k.base for k in self.known.values())
        self.base += sum(float(c.base.sum()) for c in self.linear.values())

    def _only_symbols(self) -> Lookup | None:
        """The symbols of a chain that has nothing else but an initial distribution."""
        whole = [g for g, steps in self.steps.items() if steps is None]
        if len(whole) != 1 or whole[0] not in self.lookups:
            return None
        rest = [g for g in self.steps if g != whole[0]]
        plain = all(
            g in self.cells and self.first[g] and self.graph.groups[g].mask is None for g in rest
        )
        return self.lookups[whole[0]] if plain else None

    @property
    def B(self) -> int:
        """Sequences."""
        return math.prod(self.plates)

    @cached_property
    def per_sequence(self) -> PerSequence | None:
        """The same sequence by sequence; None where the contraction has to serve."""
        return PerSequence.of(self.component.graph)

    @property
    def dims(self) -> tuple[str, ...]:
        """The plates of the sequences in which everything lies."""
        return super().dims if self.per_sequence is None else self.per_sequence.dims

    def table(self, values: Values) -> Tensor:
        """The log evidence per sequence, in nats. # (*plates,)"""
        found = None if self.per_sequence is None else self.per_sequence.table(values)
        return super().table(values) if found is None else found

    def expect(self, values: Values, weights: Tensor | None = None) -> Expectation:
        """Evidence and sums at parameter values; see `pyro_em.posteriors.block.Block`."""
        found = None
        if weights is not None and self.per_sequence is not None:
            found = self.per_sequence.expect(values, weights)
        return super().expect(values, weights) if found is None else found

    def e_step(self, at: At) -> Expectation:
        """Evidence and sums at some parameters.

        Raises:
            Handover: If a step's mass underflows or vanishes, or was lost.
        """
        groups, K = self.graph.groups, self.K
        # Both halves of the E-step need them.
        features = {g: rule.features(_ALL, at.prepared[g]) for g, rule in self.normals.items()}
        if self.symbols is None:
            log_l = self._log_likelihood(at, features)
            tops = log_l.amax(0)
            likelihood = log_l.sub_(tops).exp_().permute(2, 1, 0)
            top = tops.sum()
        else:
            likelihood, top = self._likelihood_of_symbols(at, self.symbols)
        couples = groups[self.couples]
        gamma, xi, log_evidence = smooth(likelihood, self._transition(at), self._weight(couples))
        log_evidence = log_evidence.to(top) + top
        mass = gamma.permute(2, 1, 0)  # (K, T, B)
        sums: dict[int | str, Statistics] = {}
        entries = []
        for g, table in self.cells.items():
            weights = self._at_steps(mass, g)
            if groups[g].mask is not None:
                weights = weights * self._mask(groups[g])
            entries.append(table.counts(weights.sum((1, 2))))
        for g, part in self.linear.items():
            weights = self._at_steps(mass, g)
            if g in self.lookups:
                entries.append(self.lookups[g].counts(weights.permute(1, 2, 0).reshape(-1, K)))
            else:
                entries.append((weights.reshape(K, -1) @ part.phi.T).reshape(-1))
        for g, rule in self.normals.items():
            weights = self._at_steps(mass, g)
            if groups[g].mask is not None:
                weights = weights * self._mask(groups[g])
            weights = weights.reshape(K, -1)
            if isinstance(rule, Gaussian):
                weights = weights.to(rule.x.dtype)
            total = weights.sum(1, dtype=torch.float64)
            moments = rule.moments(at.prepared[g], weights, features[g])
            sums[g] = {"moments": rule.over_rows(at.prepared[g], moments), "mass": total}
            log_evidence = log_evidence + rule.correction(at.prepared[g], moments, total)
        for g in self.others:
            sums[g] = self._counted(g, self._at_steps(mass, g), at.arguments[g])
        if self.transitions is not None:
            entries.append(self.transitions.counts(xi.reshape(-1)))
        else:  # the mask is in the weights already
            counts = xi.reshape(1, *(1,) * couples.n_plates, K, K)
            arguments, fixed = at.arguments[self.couples], self.fixed[self.couples]
            sums[self.couples] = group_sums(couples, counts, arguments, fixed, masked=True)
        for k in self.known.values():
            log_evidence = log_evidence + torch.dot(k.f, at.eta.take(k.columns))
            entries.append(k.f)
        for g in self.free:
            table = groups[g].log_density(at.arguments[g]).to(torch.float64)
            log_evidence = log_evidence + table.sum()
            sums[g] = group_sums(groups[g], torch.ones_like(table), at.arguments[g])
        evidence = checked(log_evidence, gamma, float(self.B * self.T)) + self.base
        if entries:
            sums[NATURAL] = {"features": scattered(at.eta, self.columns, entries)}
        return Expectation(evidence, sums)

    def _at_steps(self, mass: Tensor, g: int) -> Tensor:
        """Marginals at the steps of a group. # (K, steps, B)"""
        steps = self.steps[g]
        if self.first[g]:
            return mass[:, :1]
        return mass if steps is None else mass[:, steps]

    def _log_likelihood(self, at: At, features: Mapping[int, Any]) -> Tensor:
        """Log densities that read one state, summed per step. # (K, T, B)"""
        shape = (self.K, self.T, self.B)
        out: Tensor | None = None
        tables: list[tuple[int, Tensor]] = []
        for g, part in self.linear.items():
            lookup = self.lookups.get(g)
            if lookup is None:
                table = self._product(at.eta.take(part.columns), part.phi)
            else:
                table = lookup.rows(lookup.table(at.eta))
                table = table.reshape(-1, self.B, self.K).permute(2, 0, 1)
            tables.append((g, table))
        for g, rule in self.normals.items():
            table = rule.log_density(at.prepared[g], features[g]).reshape(self.K, -1, self.B)
            tables.append((g, self._masked(g, table)))
        for g in self.others:
            group = self.graph.groups[g]
            table = group.log_density(at.arguments[g]).reshape(len(group.members), -1, self.K)
            tables.append((g, table.permute(2, 0, 1).clone()))
        for g, cell in self.cells.items():  # a latent's own: a mask is for its counts alone
            tables.append((g, cell.table(at.eta).reshape(-1, 1, 1)))
        # A group that covers every step first: nothing has to be filled with zeros.
        for g, table in sorted(tables, key=lambda pair: self.steps[pair[0]] is not None):
            steps = self.steps[g]
            if steps is None:
                table = table.to(torch.float64)
                if out is not None:
                    out = out + table
                elif table.shape == shape:
                    out = table
                else:
                    out = table.expand(shape).contiguous()
                continue
            if out is None:
                out = torch.zeros(shape, dtype=torch.float64, device=table.device)
            if self.first[g]:  # an initial distribution
                out[:, :1] += table
            else:
                out.index_add_(1, steps, table.to(out.dtype).expand(-1, len(steps), self.B))
        assert out is not None
        return out

    def _likelihood_of_symbols(self, at: At, symbols: Lookup) -> tuple[Tensor, Tensor]:
        """Likelihoods over their maxima, and the sum of the maxima's logarithms. # (B, T, K)"""
        table = symbols.table(at.eta)
        tops = table.amax(1, keepdim=True)
        likelihood = symbols.rows((table - tops).exp_())
        top = torch.dot(symbols.often, tops.squeeze(1))
        if self.cells:  # the initial distribution
            first = symbols.index[: self.B]
            row = table.index_select(0, first)
            for cell in self.cells.values():
                row = row + cell.table(at.eta)
            own = row.amax(1, keepdim=True)
            likelihood[: self.B] = (row - own).exp_()
            top = top + (own - tops.index_select(0, first)).sum()
        return likelihood.reshape(self.T, self.B, self.K).permute(1, 0, 2), top

    def _product(self, theta: Tensor, phi: Tensor) -> Tensor:
        """Θ Φ; what is last in memory is what `smooth` wants there. # (K, steps, B)"""
        if self.lanes:
            return (theta @ phi).reshape(self.K, -1, self.B)
        return (phi.T @ theta.T).reshape(-1, self.B, self.K).permute(2, 0, 1)

    def _transition(self, at: At) -> Tensor:
        """Transition probabilities. # (K, K)"""
        if self.transitions is not None:
            return self.transitions.table(at.eta).exp_().reshape(self.K, self.K)
        couples = self.graph.groups[self.couples]
        assert couples.family is not None
        log_a = couples.family.log_prob(couples.value, at.arguments[self.couples])
        return log_a.reshape(self.K, self.K).to(torch.float64).exp()

    def _counted(self, g: int, weights: Tensor, arguments: Mapping[str, Tensor]) -> Statistics:
        group = self.graph.groups[g]
        counts = weights.permute(1, 2, 0)  # (members, B, K)
        counts = counts.sum(1) if group.n_plates == 0 else counts.reshape(-1, *self.plates, self.K)
        return group_sums(group, counts, arguments, self.fixed[g])

    def _masked(self, g: int, table: Tensor) -> Tensor:
        """Zero where a group does not count. # (K, members or 1, B or 1)"""
        if self.graph.groups[g].mask is None:
            return table
        return torch.where(self._mask(self.graph.groups[g]), table, 0.0)

    def _mask(self, group: Group) -> Tensor:
        """Where a group counts. # (members or 1, B or 1)"""
        assert group.mask is not None
        return group.mask.reshape(group.mask.shape[0], -1)

    def _weight(self, couples: Group) -> Tensor | None:
        """How much each transition counts: masked ones do not. # (B or 1, T - 1 or 1)"""
        if couples.mask is None:
            return None
        return self._mask(couples).T.to(torch.float64)


def _reads_no_row(group: Group) -> bool:
    """Whether the group is one table of the state, the same for all sequences."""
    tensors = [group.value, *group.arguments.values()]
    return (
        len(group.members) == 1
        and not group.observed
        and all(n == 1 for t in tensors for n in t.shape[: 1 + group.n_plates])
    )
