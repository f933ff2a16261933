"""The block that serves every component: elimination of its latents in any order.

    table(cell) = log Σ_z Π_f f(z, cell),     E[T | cell] from the gradient of the table

The latents of the scope are treated as plates: given them, their cells are independent. A block that
is nested inside gives its table in place of its factors; the gradient with respect to that table is
the posterior of its cells, which weighs its sums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from pyro_em.errors import Finding
from pyro_em.families.family import Statistics
from pyro_em.graph.factors import FactorGraph
from pyro_em.posteriors.block import Block, Component, Values
from pyro_em.posteriors.contraction import contract
from pyro_em.posteriors.elimination import ContractionPlan, plan_contraction
from pyro_em.posteriors.enumeration import scales_of
from pyro_em.tracing.sites import Role
from pyro_em.updates.expectations.statistics import Expectation, Key, group_sums

Places = tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class Contraction:
    """A component by contraction of its factors.

    Attributes:
        graph: The factor graph.
        latents: The latents that it sums.
        scope: Discrete latents outside that it reads.
        factors: Its factors: group, and member of the group.
        inner: Blocks that are nested inside.
        order: The order of elimination.
    """

    graph: FactorGraph
    latents: tuple[str, ...]
    scope: tuple[str, ...]
    factors: Places
    inner: tuple[Block, ...]
    order: ContractionPlan

    name: ClassVar[str] = "contraction"

    @classmethod
    def match(cls, component: Component) -> Self | Finding:
        """The contraction of a component, which always serves unless a scope is scaled."""
        found = contraction_around(component, ())
        return found if isinstance(found, Finding) else cls(**vars(found))

    @property
    def dims(self) -> tuple[str, ...]:
        """The names of the dimensions of `table`: plates that all its terms share, then the scope."""
        shared = [set(dims) for dims in self._term_dims()]
        plates = [d for d in self.graph.structure.plates if all(d in s for s in shared)]
        return (*plates, *self.scope)

    def table(self, values: Values) -> Tensor:
        """The log evidence per cell, in nats. # (*plates, *scope)"""
        return self._evidence(self._leaves(values), self._nested(values))

    @torch.enable_grad()
    def expect(self, values: Values, weights: Tensor | None = None) -> Expectation:
        """Evidence and sums, each cell of `table` counted as often as it weighs.

        Args:
            values: Constrained parameter values by name.
            weights: One number per cell of ``table``; one each where None. # (*plates, *scope)
        """
        fixed = {name: v.detach() for name, v in values.items()}
        leaves = {k: t.detach().requires_grad_() for k, t in self._leaves(fixed).items()}
        nested = [t.detach().requires_grad_() for t in self._nested(fixed)]
        table = self._evidence(leaves, nested)
        total = table.sum() if weights is None else (table * weights).sum()
        cells = torch.autograd.grad(total, [*leaves.values(), *nested], allow_unused=True)
        own = dict(zip(leaves, cells[: len(leaves)], strict=True))
        sums, references = self._sums(own, fixed)
        found = Expectation(0.0, sums, references)
        for block, cell in zip(self.inner, cells[len(leaves) :], strict=True):
            found = found + block.expect(fixed, cell)
        return Expectation(float(total.detach()), found.sums, found.references)

    def marginals(self, values: Values) -> dict[str, Tensor]:
        """Posterior probabilities of its latents, where nothing is in its scope. # (*plates, K)"""
        with torch.enable_grad():
            fixed = {name: v.detach() for name, v in values.items()}
            leaves = {k: t.detach().requires_grad_() for k, t in self._leaves(fixed).items()}
            total = self._evidence(leaves, self._nested(fixed)).sum()
            cells = dict(
                zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True)
            )
        out = {}
        for (g, i), cell in cells.items():
            name = self.graph.groups[g].members[i]
            if name in self.latents:
                dims = self.graph.groups[g].dims[i]
                keep = (*self.graph.latents[name].plates, name)
                axes = [k for k, d in enumerate(dims) if d not in keep]
                summed = cell.sum(axes) if axes else cell
                out[name] = summed / summed.sum(-1, keepdim=True)
        return out

    def _leaves(self, values: Values) -> dict[tuple[int, int], Tensor]:
        """Log densities of the factors, in float64. # per factor (*plates, *latents)"""
        tables = {
            g: self.graph.groups[g].log_density_at(values).to(torch.float64)
            for g in dict.fromkeys(g for g, _ in self.factors)
        }
        return {(g, i): tables[g][i] for g, i in self.factors}

    def _nested(self, values: Values) -> list[Tensor]:
        return [block.table(values).to(torch.float64) for block in self.inner]

    def _evidence(
        self, leaves: Mapping[tuple[int, int], Tensor], nested: Sequence[Tensor]
    ) -> Tensor:
        laid_out = []
        for (g, i), table in leaves.items():
            laid_out.append(self._with_scope(table, self.graph.groups[g].dims[i]))
        for block, table in zip(self.inner, nested, strict=True):
            laid_out.append(self._with_scope(table, block.dims))
        scales = None
        if scales_of(self.graph) is not None:
            scales = [self.graph.groups[g].scale[i] for g, i in self.factors]
            scales += [1.0] * len(nested)
        total: Tensor | None = None
        for dims, term in contract(self.order, laid_out, scales=scales):
            part = onto(term, dims, self.dims, self.graph)
            total = part if total is None else total + part
        assert total is not None
        return total

    def _with_scope(self, table: Tensor, dims: Sequence[str]) -> Tensor:
        """A table with a dimension for every latent of the scope. # (*plates, *scope, *latents)"""
        if not self.scope:
            return table
        target = scoped_dims(dims, self.scope, self.graph)
        present = [d for d in target if d in dims]
        table = table.permute([list(dims).index(d) for d in present])
        shape = [self.graph.dim_size(d) for d in target]
        for axis, d in enumerate(target):
            if d not in dims:
                table = table.unsqueeze(axis)
        return table.expand(shape)

    def _term_dims(self) -> list[tuple[str, ...]]:
        probe = [
            torch.zeros(()).expand([self.graph.dim_size(d) for d in dims])
            for dims in self.order.factor_dims
        ]
        return [dims for dims, _ in contract(self.order, probe)]

    def _sums(
        self, cells: Mapping[tuple[int, int], Tensor | None], values: Values
    ) -> tuple[dict[Key, Statistics], dict[int, Mapping[str, Tensor]]]:
        """E[T] of every group that has sums, from the posterior of its cells."""
        sums: dict[Key, Statistics] = {}
        references: dict[int, Mapping[str, Tensor]] = {}
        for g in dict.fromkeys(g for g, _ in self.factors):
            group = self.graph.groups[g]
            if group.family is None:
                continue
            none = torch.zeros(group.sizes, dtype=torch.float64, device=group.value.device)
            parts = [cells.get((g, i)) for i in range(len(group.members))]
            counts = torch.stack([none if part is None else part for part in parts])
            arguments = {n: a.detach() for n, a in group.evaluate_arguments(values).items()}
            sums[g] = group_sums(group, counts, arguments)
            references[g] = arguments
        return sums, references


def contraction_around(component: Component, inner: Sequence[Block]) -> Contraction | Finding:
    """The contraction of a component's factors, with blocks nested inside.

    Priors on point estimates are no part of the log evidence, unless they read a latent.

    Args:
        component: The component; latents of ``inner`` may be among its latents.
        inner: Blocks whose tables take the place of their factors.
    """
    graph, scope = component.graph, component.scope
    if scope and scales_of(graph) is not None:
        return Finding("poutine.scale", "a scale on what reads a latent outside: not nested")
    taken = {name for block in inner for name in block.latents}
    latents = tuple(n for n in component.latents if n not in taken)
    foreign = set(graph.latents) - set(component.latents)
    factors = []
    for g, group in enumerate(graph.groups):
        for i, dims in enumerate(group.dims):
            read = {d for d in dims if d in graph.latents}
            of_others = bool(read & taken) or (bool(read) and read <= foreign)
            is_prior = group.role is Role.POINT and not read
            if not of_others and not is_prior and (read or not scope):
                factors.append((g, i))
    laid = [scoped_dims(graph.groups[g].dims[i], scope, graph) for g, i in factors]
    laid.extend(scoped_dims(block.dims, scope, graph) for block in inner)
    own: list[str | None] = [
        None if graph.groups[g].observed else graph.groups[g].members[i] for g, i in factors
    ]
    own += [None] * len(inner)
    order = plan_contraction(
        laid,
        {n: (*graph.latents[n].plates, *scope) for n in latents},
        {d: graph.dim_size(d) for ds in laid for d in ds},
        own_latent=own,
    )
    return Contraction(graph, latents, scope, tuple(factors), tuple(inner), order)


def scoped_dims(dims: Sequence[str], scope: Sequence[str], graph: FactorGraph) -> tuple[str, ...]:
    """A factor's dimensions with those of the scope among its plates."""
    plates = [d for d in dims if d not in graph.latents]
    rest = [d for d in dims if d in graph.latents and d not in scope]
    return (*plates, *scope, *rest)


def onto(term: Tensor, dims: Sequence[str], target: Sequence[str], graph: FactorGraph) -> Tensor:
    """A table summed over what the target lacks, and laid out over it."""
    axes = [k for k, d in enumerate(dims) if d not in target]
    term = term.sum(axes) if axes else term
    kept = [d for d in dims if d in target]
    present = [d for d in target if d in kept]
    term = term.permute([kept.index(d) for d in present])
    for axis, d in enumerate(target):
        if d not in kept:
            term = term.unsqueeze(axis)
    return term.expand([graph.dim_size(d) for d in target])
