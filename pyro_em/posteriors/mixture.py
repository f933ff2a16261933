"""The E-step of a mixture: one latent per row of a plate, in chunks of rows.

    log p(x_n) = log Σ_k exp ℓ_nk,   r_nk = exp(ℓ_nk − log p(x_n)),   S = Σ_n Σ_k r_nk T(x_n)

Nothing of size N × K is kept: each chunk adds to the evidence and to the sufficient statistics. Rows
that occur several times are computed once and counted as often as they occur, which is exact. A
sample weight (``poutine.scale``) counts in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import ClassVar, Self

import torch
from torch import Tensor

from pyro_em.densities.density import NormalRows, checked, scattered
from pyro_em.densities.features import Cells, Counted, Known, cells, counted, known, merged
from pyro_em.densities.gaussian import Gaussian, as_gaussian
from pyro_em.densities.layout import Layout
from pyro_em.densities.theta import At, Theta
from pyro_em.densities.with_missing import as_incomplete
from pyro_em.errors import Finding
from pyro_em.families.family import Statistics
from pyro_em.graph.factors import FactorGraph, Group, Latent
from pyro_em.posteriors.block import Component, Values
from pyro_em.posteriors.per_row import PerRow
from pyro_em.posteriors.quick import Outline, QuickBlock
from pyro_em.posteriors.rows import (
    Shape,
    distinct,
    restricted,
    row_weights,
    shape_of_rows,
    varies,
    why_no_rows,
    why_not_constant,
)
from pyro_em.updates.statistics import NATURAL, Expectation, group_sums

_CHUNK_BYTES = 2**21


_IMPOSSIBLE = -1e29


@dataclass(eq=False)
class Mixture(QuickBlock):
    """A mixture over the rows of one plate.

    Attributes:
        graph: The collapsed graph; values may hold distinct rows only.
        N: Rows that are held.
        K: Components.
        linear: All linear groups that read rows, as one; None where there are none.
        normals: Normal groups that are evaluated by matrix products.
        others: Groups that are evaluated chunk by chunk by their family.
        cells: Linear groups that read the component but no row.
        tables: Other groups that read the component but no row.
        known: Linear groups that read no component.
        free: Other groups that read no component.
        repeats: How often each row occurs, or its weight; None where each counts once. # (N,)
        counted: Which rows of a Normal group count, where some are masked. # (N,)
    """

    graph: FactorGraph
    N: int
    K: int
    linear: Counted | None
    normals: Mapping[int, NormalRows]
    others: tuple[int, ...]
    cells: Mapping[int, Cells]
    tables: tuple[int, ...]
    known: Mapping[int, Known]
    free: tuple[int, ...]
    repeats: Tensor | None
    component: Component = field(init=False)
    theta: Theta = field(init=False)
    chunk: int = field(init=False)
    columns: Tensor = field(init=False)
    base: float = field(init=False)
    total: float = field(init=False)
    counted: Mapping[int, Tensor] = field(init=False)

    name: ClassVar[str] = "mixture"
    words: ClassVar[str] = "mixture kernel, in chunks of rows"

    @classmethod
    def glance(cls, latents: Mapping[str, Latent]) -> Finding | None:
        """See `pyro_em.posteriors.quick.QuickBlock.glance`."""
        return why_no_rows(latents)

    @classmethod
    def outline(cls, component: Component) -> Outline[Self] | Finding:
        """See `pyro_em.posteriors.quick.QuickBlock.outline`."""
        graph = component.graph
        shape = shape_of_rows(graph)
        if isinstance(shape, Finding):
            return shape
        weight = row_weights(graph, shape)
        if isinstance(weight, Finding):
            return weight
        graph, repeats = distinct(graph, shape, weight)
        return Outline(graph, shape.eligible(graph), partial(cls.of, graph, shape, repeats))

    @classmethod
    def of(
        cls, graph: FactorGraph, shape: Shape, repeats: Tensor | None, layout: Layout
    ) -> Self | Finding:
        """The kernel of a mixture over rows, still without its parameters, or why there is none.

        Args:
            graph: A collapsed graph, of distinct rows where there are ``repeats``.
            shape: Its shape.
            repeats: How often each row occurs, or its weight.
            layout: How its groups are evaluated.
        """
        K, groups = shape.size, graph.groups
        linears, lines = layout.linears, layout.lines
        N = graph.dim_size(shape.plate) if repeats is None else len(repeats)
        parts: list[Counted] = []
        normals: dict[int, NormalRows] = {}
        others: list[int] = []
        for g in shape.rowwise:
            if g in linears:
                part = counted(groups[g], *linears[g], K, members_are_rows=False)
                if part is None:
                    return why_not_constant(groups[g])
                parts.append(part)
                continue
            mask = groups[g].mask
            single = len(groups[g].members) == 1 and (mask is None or mask.shape[2] == 1)
            if g in lines and single and mask is None:
                normals[g] = lines[g]
                continue
            if varies(groups[g]):
                return why_not_constant(groups[g])
            rule = (
                as_gaussian(groups[g], K, graph.all_data)
                or as_incomplete(groups[g], K, graph.all_data)
                if single
                else None
            )
            if rule is None:
                others.append(g)
            else:
                normals[g] = rule
        return cls(
            graph,
            N,
            K,
            merged(parts) if parts else None,
            normals,
            tuple(others),
            {g: cells(groups[g], *linears[g]) for g in shape.tables if g in linears},
            tuple(g for g in shape.tables if g not in linears),
            {g: known(groups[g], *linears[g]) for g in shape.free if g in linears},
            tuple(g for g in shape.free if g not in linears),
            repeats,
        )

    def __post_init__(self) -> None:
        width = self.K * (2 + sum(len(self.graph.groups[g].members) for g in self.others))
        width += sum(g.width for g in self.normals.values())
        single = self.linear is None and self.normals and self._is_single()
        self.chunk = max(1024, min(16384, _CHUNK_BYTES // ((4 if single else 8) * width)))
        parts = [c.columns for c in self.cells.values()]
        parts += [k.columns for k in self.known.values()]
        self.base = sum(k.base for k in self.known.values())
        self.total = float(self.N)
        if self.linear is not None:
            parts.append(self.linear.columns.reshape(-1))
            rows = self.linear.base if self.repeats is None else self.linear.base * self.repeats
            self.base += float(rows.sum())
        if self.repeats is not None:
            self.total = float(self.repeats.sum())
        device = self.graph.groups[0].value.device
        none = torch.empty(0, dtype=torch.long, device=device)
        self.columns = torch.cat([none, *parts])
        self.counted = {
            g: mask.reshape(-1).expand(self.N)
            for g in self.normals
            if (mask := self.graph.groups[g].mask) is not None
        }

    def e_step(self, at: At) -> Expectation:
        """Evidence and sums at some parameters.

        Raises:
            Handover: If a row is impossible, a density is not a number, or mass was lost.
        """
        eta = None if at.natural is None else at.natural.eta
        constant = self._constant(at, eta)
        # In float32 the exponential of numbers far below −87 is slow; a weight of e⁻⁸⁰ counts nothing.
        # A weight of exactly zero has to stay.
        may_clamp = self.linear is None and not self.others and self._is_single()
        may_clamp = may_clamp and bool((constant > _IMPOSSIBLE).all())
        theta = None
        if self.linear is not None:
            assert eta is not None
            theta = eta.take(self.linear.columns)
        sums = _Collected()
        for begin in range(0, self.N, self.chunk):
            rows = slice(begin, min(begin + self.chunk, self.N))
            joint = constant
            if self.linear is not None:
                assert theta is not None
                joint = torch.addmm(joint, theta, self.linear.phi[:, rows])
            features = {g: rule.features(rows, at.prepared[g]) for g, rule in self.normals.items()}
            for g, rule in self.normals.items():
                if g not in self.counted:
                    joint = rule.log_density(at.prepared[g], features[g], joint)
                    continue
                table = rule.log_density(at.prepared[g], features[g])
                joint = joint + torch.where(self.counted[g][rows], table, 0.0)
            parts = {g: restricted(self.graph.groups[g], rows) for g in self.others}
            for g, part in parts.items():
                table = part.log_density(at.arguments[g])
                joint = joint + table.reshape(len(part.members), -1, self.K).sum(0).T
            top = joint.amax(0)
            weights = joint.sub_(top)
            if may_clamp:
                weights.clamp_(min=-80.0)
            weights.exp_()
            if may_clamp:
                torch.threshold_(weights, 2e-35, 0.0)
            mass = weights.sum(0)
            log_p = (
                mass.log().add_(top) if top.dtype == torch.float64 else top.double() + mass.log()
            )
            if self.repeats is None:
                weights.div_(mass)
                sums.add("evidence", log_p.sum())
            else:
                own = self.repeats[rows]
                weights.mul_(own / mass)
                sums.add("evidence", torch.dot(log_p, own))
            sums.add("mass", weights.sum(1, dtype=torch.float64))
            if self.linear is not None:
                wide = weights if weights.dtype == torch.float64 else weights.double()
                sums.add("linear", wide @ self.linear.phi[:, rows].T)
            for g, rule in self.normals.items():
                own = weights
                if g in self.counted:
                    own = weights * self.counted[g][rows]
                    sums.add(f"mass of {g}", own.sum(1, dtype=torch.float64))
                sums.add(g, rule.moments(at.prepared[g], own, features[g]))
            for g, part in parts.items():
                sums.add_statistics(g, self._counted(part, weights, at.arguments[g]))
        return self._summed(at, eta, sums)

    @cached_property
    def per_row(self) -> PerRow:
        """The same row by row; none is merged with others."""
        graph = self.component.graph
        shape = shape_of_rows(graph)
        assert isinstance(shape, Shape)
        counts = row_weights(graph, shape)
        assert isinstance(counts, Tensor)
        return PerRow(graph, shape, counts)

    @property
    def dims(self) -> tuple[str, ...]:
        """The plate of the rows, where nothing lies outside it."""
        return self.per_row.dims

    def table(self, values: Values) -> Tensor:
        """The log evidence per row, in nats. # (N,), or () where something lies outside the rows"""
        return self.per_row.table(values)

    def expect(self, values: Values, weights: Tensor | None = None) -> Expectation:
        """Evidence and sums at parameter values; see `pyro_em.posteriors.block.Block`."""
        if weights is None:
            return super().expect(values)
        return self.per_row.expect(values, weights)

    def _is_single(self) -> bool:
        """Whether all Normal groups are Gaussian components in float32."""
        return all(
            isinstance(r, Gaussian) and r.x.dtype == torch.float32 for r in self.normals.values()
        )

    def _constant(self, at: At, eta: Tensor | None) -> Tensor:
        """Log densities that no row reaches. # (K, 1)"""
        out: Tensor | None = None
        for table in self.cells.values():
            assert eta is not None
            part = table.table(eta)
            out = part if out is None else out + part
        for g in self.tables:
            group = self.graph.groups[g]
            assert group.family is not None
            log_p = group.family.log_prob(group.value, at.arguments[g])
            part = log_p.reshape(self.K).to(torch.float64)
            out = part if out is None else out + part
        if out is None:
            device = self.graph.groups[0].value.device
            out = torch.zeros(self.K, dtype=torch.float64, device=device)
        return out.unsqueeze(-1)

    def _counted(self, part: Group, weights: Tensor, arguments: Mapping[str, Tensor]) -> Statistics:
        counts = weights.T.reshape(1, *part.sizes).expand(len(part.members), *part.sizes)
        return group_sums(part, counts, arguments)

    def _summed(self, at: At, eta: Tensor | None, sums: _Collected) -> Expectation:
        """What was collected over the chunks, and what no row reaches."""
        groups, mass, evidence = self.graph.groups, sums["mass"], sums["evidence"]
        out = dict(sums.statistics)
        for g in self.free:
            table = groups[g].log_density(at.arguments[g]).to(torch.float64)
            evidence = evidence + table.sum()
            out[g] = group_sums(groups[g], torch.ones_like(table), at.arguments[g])
        for g in self.tables:
            counts = mass.reshape(*(1,) * (1 + groups[g].n_plates), self.K)
            out[g] = group_sums(groups[g], counts, at.arguments[g])
        entries = [t.counts(mass) for t in self.cells.values()]
        for k in self.known.values():
            assert eta is not None
            evidence = evidence + torch.dot(k.f, eta.take(k.columns))
            entries.append(k.f)
        if self.linear is not None:
            entries.append(sums["linear"].reshape(-1))
        counted = {g: sums[f"mass of {g}"] if g in self.counted else mass for g in self.normals}
        for g, rule in self.normals.items():
            evidence = evidence + rule.correction(at.prepared[g], sums[g], counted[g])
        log_evidence = checked(evidence, mass, self.total) + self.base
        if entries:
            assert eta is not None
            out[NATURAL] = {"features": scattered(eta, self.columns, entries)}
        for g, rule in self.normals.items():
            moments = rule.over_rows(at.prepared[g], sums[g])
            out[g] = {"moments": moments, "mass": counted[g]}
        largest = max((at.prepared[g].size for g in self.normals), default=0.0)
        noise = 2e-16 * self.total / self.N**0.5 * largest
        return Expectation(log_evidence, out, noise=noise)


class _Collected(dict[int | str, Tensor]):
    """Sums over chunks."""

    def __init__(self) -> None:
        super().__init__()
        self.statistics: dict[int | str, Statistics] = {}

    def add(self, key: int | str, part: Tensor) -> None:
        """Add a part."""
        self[key] = self[key] + part if key in self else part

    def add_statistics(self, g: int, part: Statistics) -> None:
        """Add the statistics of a group's rows."""
        part = {name: s.to(torch.float64) for name, s in part.items()}
        before = self.statistics.get(g)
        self.statistics[g] = (
            part if before is None else {name: before[name] + s for name, s in part.items()}
        )
