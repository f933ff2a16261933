"""The E-step of a mixture: one latent per row of a plate, in chunks of rows.

    log p(x_n) = log Σ_k exp ℓ_nk,   r_nk = exp(ℓ_nk − log p(x_n)),   S = Σ_n Σ_k r_nk T(x_n)

Nothing of size N × K is kept: each chunk adds to the evidence and to the sufficient statistics. Rows
that occur several times are computed once and counted as often as they occur, which is exact. A
sample weight (``poutine.scale``) counts in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import ClassVar, Self

import torch
from torch import Tensor

from pyro_em.densities.compiled import CompiledRows, serves, swept
from pyro_em.densities.density import NormalRows, checked, scattered
from pyro_em.densities.features import Cells, Known, cells, known
from pyro_em.densities.gaussian import Gaussian
from pyro_em.densities.layout import Layout
from pyro_em.densities.medians import LaplaceRows
from pyro_em.densities.row_features import Piece, RowFeatures, base_of, pieces_of
from pyro_em.densities.rules import rule_of
from pyro_em.densities.theta import At, Theta
from pyro_em.densities.trials import as_trials
from pyro_em.errors import Finding
from pyro_em.graph.factors import FactorGraph, Group, Latent
from pyro_em.posteriors.block import Component, Values
from pyro_em.posteriors.contracted import Contraction
from pyro_em.posteriors.mixtures.few_rows import FewRows
from pyro_em.posteriors.mixtures.labels import Labels
from pyro_em.posteriors.mixtures.per_row import PerRow
from pyro_em.posteriors.mixtures.product_states import added, summed
from pyro_em.posteriors.mixtures.responsibilities import sum_of_logs, unnormalised
from pyro_em.posteriors.mixtures.row_factors import Collected, RowFactors
from pyro_em.posteriors.mixtures.row_groups import reads_by_rows
from pyro_em.posteriors.mixtures.rows import (
    RowShape,
    distinct,
    row_weights,
    shape_of_rows,
    varies,
    why_no_rows,
    why_not_constant,
)
from pyro_em.posteriors.quick import EMSteps, Outline, QuickBlock
from pyro_em.updates.expectations.statistics import NATURAL, Expectation, group_sums

_CHUNK_BYTES = 2**21


IMPOSSIBLE = -1e29


@dataclass(eq=False)
class Mixture(QuickBlock):
    """A mixture over the rows of one plate.

    Attributes:
        graph: The collapsed graph; values may hold distinct rows only.
        shape: Its groups, by what they read.
        N: Rows that are held.
        factors: The groups that read rows, those that read the same latents together.
        cells: Linear groups that read latents but no row.
        tables: Other groups that read latents but no row.
        known: Linear groups that read no latent.
        free: Other groups that read no latent.
        repeats: How often each row occurs, or its weight; None where each counts once. # (N,)
        base: What no parameter reaches of the log evidence: of the rows, and of all.
    """

    graph: FactorGraph
    shape: RowShape
    N: int
    factors: tuple[RowFactors, ...]
    cells: Mapping[int, Cells]
    tables: tuple[int, ...]
    known: Mapping[int, Known]
    free: tuple[int, ...]
    repeats: Tensor | None
    base: float = 0.0
    component: Component = field(init=False)
    theta: Theta = field(init=False)
    chunk: int = field(init=False)
    columns: Tensor = field(init=False)
    total: float = field(init=False)
    normals: Mapping[int, NormalRows] = field(init=False)

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
        found = why_no_rows(graph.latents) or outline_of_rows(graph)
        if isinstance(found, Finding):
            return found
        graph, shape, repeats = found
        return Outline(graph, shape.eligible(graph), partial(cls.of, graph, shape, repeats))

    @classmethod
    def of(
        cls, graph: FactorGraph, shape: RowShape, repeats: Tensor | None, layout: Layout
    ) -> Self | Finding:
        """The kernel of a mixture over rows, still without its parameters, or why there is none.

        Args:
            graph: A collapsed graph, of distinct rows where there are ``repeats``.
            shape: Its shape.
            repeats: How often each row occurs, or its weight.
            layout: How its groups are evaluated.
        """
        groups, linears = graph.groups, layout.linears
        N = graph.dim_size(shape.plate) if repeats is None else len(repeats)
        together: dict[tuple[int, ...], list[int]] = {}
        for g in shape.rowwise:
            together.setdefault(shape.reads[g], []).append(g)
        factors, base = [], 0.0
        for reads, own in together.items():
            found = _factors(graph, shape, layout, N, reads, own)
            if isinstance(found, Finding):
                return found
            factors.append(found)
            for g in own:
                h = base_of(groups[g], linears[g][1], repeats) if g in linears else 0.0
                if h is None:
                    return why_not_constant(groups[g])
                base += h
        return cls(
            graph,
            shape,
            N,
            tuple(factors),
            {g: _cells(groups[g], g, layout) for g in shape.tables if g in linears},
            tuple(g for g in shape.tables if g not in linears),
            {g: known(groups[g], *linears[g]) for g in shape.free if g in linears},
            tuple(g for g in shape.free if g not in linears),
            repeats,
            base,
        )

    def __post_init__(self) -> None:
        self.normals = {g: rule for f in self.factors for g, rule in f.normals.items()}
        width = self._width()
        single = all(f.linear is None for f in self.factors) and self.normals and self._is_single()
        rows = _CHUNK_BYTES // ((4 if single else 8) * width)
        # In multiples of 64, so that logarithms are shared without a rest.
        self.chunk = max(min(1024, 2**20 // self._cells), min(32768, rows // 64 * 64))
        parts = [c.columns for c in self.cells.values()]
        parts += [k.columns for k in self.known.values()]
        parts += [f.linear.entries for f in self.factors if f.linear is not None]
        self.base += sum(k.base for k in self.known.values())
        self.total = float(self.N)
        if self.repeats is not None:
            self.total = float(self.repeats.sum())
        device = self.graph.groups[0].value.device
        none = torch.empty(0, dtype=torch.long, device=device)
        self.columns = torch.cat([none, *parts])

    def _width(self) -> int:
        """Numbers per row that a chunk holds."""
        width = sum(f.width(self.graph) for f in self.factors)
        return width + 2 * self.K * (len(self.factors[0].reads) < len(self.shape.sizes))

    @property
    def _cells(self) -> int:
        """How many cells a row has in the table of a chunk."""
        return self.K

    @cached_property
    def K(self) -> int:
        """How many values the latents of a row have together."""
        return self.shape.size

    def e_step(self, at: At) -> Expectation:
        """Evidence and sums at some parameters.

        Raises:
            Handover: If a row is impossible, a density is not a number, or mass was lost.
        """
        eta = None if at.natural is None else at.natural.eta
        sizes = self.shape.sizes
        constant = self._constant(at, eta)
        # In float32 the exponential of numbers far below −87 is slow; a weight of e⁻⁸⁰ counts nothing.
        # A weight of exactly zero has to stay.
        may_clamp = all(f.linear is None and not f.others for f in self.factors)
        may_clamp = may_clamp and self._is_single() and bool((constant > IMPOSSIBLE).all())
        if self._sole is not None:
            found = self._swept(at, constant, *self._sole)
            if found is not None:
                return self._summed(at, eta, found)
        thetas = [theta_of_linear(eta, f.linear) for f in self.factors]
        sums = Collected(self.N)
        for begin in range(0, self.N, self.chunk):
            rows = slice(begin, min(begin + self.chunk, self.N))
            here = [f.at(self.graph, at, rows) for f in self.factors]
            joint = constant
            for f, theta, own in zip(self.factors, thetas, here, strict=True):
                if len(f.reads) == len(sizes):
                    joint = f.log_density(at, theta, own, joint)
                else:
                    joint = added(joint, f.log_density(at, theta, own, None), sizes, f.reads)
            top, weights, mass = unnormalised(joint, may_clamp)
            if self.repeats is None:
                weights.div_(mass)
                sums.add("evidence", top.sum(dtype=torch.float64) + sum_of_logs(mass))
            else:
                often = self.repeats[rows]
                weights.mul_(often / mass)
                log_p = mass.log().to(torch.float64).add_(top)
                sums.add("evidence", torch.dot(log_p, often))
            sums.add("mass", weights.sum(1, dtype=torch.float64))
            for i, (f, own) in enumerate(zip(self.factors, here, strict=True)):
                f.collect(at, summed(weights, sizes, f.reads), own, sums, i)
        return self._summed(at, eta, sums)

    @cached_property
    def _sole(self) -> tuple[int, CompiledRows] | None:
        """The only group that reads rows, where a compiled loop may add them up."""
        if len(self.factors) > 1 or self.factors[0].linear is not None or self.factors[0].labels:
            return None
        (f,) = self.factors
        rules = list(f.normals.items())
        if len(rules) != 1 or f.others or f.counted or len(f.reads) < len(self.shape.sizes):
            return None
        g, rule = rules[0]
        if not serves(self.N, self.K, self.graph.groups[g].value.device):
            return None
        return (g, rule) if isinstance(rule, CompiledRows) else None

    def steps(self, theta: Theta) -> EMSteps:
        """The same, where few rows read components and nothing else: all of them at once."""
        is_alone = len(self.factors) == 1 and not (self.tables or self.known or self.free)
        if not is_alone or self.repeats is not None or self.chunk < self.N:
            return self
        (factors,) = self.factors
        if len(factors.reads) < len(self.shape.sizes):
            return self
        return FewRows.of(factors, self.cells, self.N, theta, self) or self

    def _swept(self, at: At, constant: Tensor, g: int, rule: CompiledRows) -> Collected | None:
        """Evidence and sums by a compiled loop; None where it does not serve."""
        found = rule.loop(at.prepared[g], constant)
        if found is None:
            return None
        loop, moments = found
        sums = Collected(self.N)
        sums["evidence"], sums["mass"], sums[g] = swept(loop, self.N, self.repeats, self.K, moments)
        return sums

    @cached_property
    def per_row(self) -> PerRow:
        """The same row by row; none is merged with others."""
        graph = self.component.graph
        shape = shape_of_rows(graph)
        assert isinstance(shape, RowShape)
        counts = row_weights(graph, shape)
        assert not isinstance(counts, Finding)
        if counts is None:
            device = graph.groups[0].value.device
            counts = torch.ones(graph.dim_size(shape.plate), dtype=torch.float64, device=device)
        return PerRow(graph, shape, counts)

    @property
    def by_cell(self) -> PerRow | Contraction:
        """What says evidence of each cell by itself, and weighs cells differently."""
        return self.per_row

    @property
    def dims(self) -> tuple[str, ...]:
        """The plate of the rows, where nothing lies outside it."""
        return self.by_cell.dims

    def table(self, values: Values) -> Tensor:
        """The log evidence per row, in nats. # (N,), or () where something lies outside the rows"""
        return self.by_cell.table(values)

    def expect(self, values: Values, weights: Tensor | None = None) -> Expectation:
        """Evidence and sums at parameter values; see `pyro_em.posteriors.block.Block`."""
        if weights is None:
            return super().expect(values)
        return self.by_cell.expect(values, weights)

    def _is_single(self) -> bool:
        """Whether all Normal groups are Gaussian components in float32."""
        return all(
            isinstance(r, Gaussian) and r.x.dtype == torch.float32 for r in self.normals.values()
        )

    def _constant(self, at: At, eta: Tensor | None) -> Tensor:
        """Log densities that no row reaches. # (K, 1)"""
        parts: dict[int, Tensor] = {}
        for g, table in self.cells.items():
            assert eta is not None
            parts[g] = table.table(eta)
        for g in self.tables:
            group = self.graph.groups[g]
            assert group.family is not None
            log_p = group.family.log_prob(group.value, at.arguments[g])
            size = self.shape.size_of(g)
            parts[g] = log_p.reshape(-1).expand(size).to(torch.float64)
        out: Tensor | None = None
        for g, part in parts.items():
            reads = self.shape.reads[g]
            if out is None and len(reads) == len(self.shape.sizes):
                out = part
                continue
            if out is None:
                out = part.new_zeros(self.K)
            out = added(out, part, self.shape.sizes, reads)
        if out is None:
            device = self.graph.groups[0].value.device
            out = torch.zeros(self.K, dtype=torch.float64, device=device)
        return out.unsqueeze(-1)

    def _summed(self, at: At, eta: Tensor | None, sums: Collected) -> Expectation:
        """What was collected over the chunks, and what no row reaches."""
        groups, mass, evidence = self.graph.groups, sums["mass"], sums["evidence"]
        sizes = self.shape.sizes
        masses = {
            reads: mass if len(reads) == len(sizes) else summed(mass, sizes, reads)
            for reads in dict.fromkeys(r for r in self.shape.reads if r)
        }
        out = dict(sums.statistics)
        for g in self.free:
            table = groups[g].log_density(at.arguments[g]).to(torch.float64)
            evidence = evidence + table.sum()
            out[g] = group_sums(groups[g], torch.ones_like(table), at.arguments[g])
        for g in self.tables:
            counts = masses[self.shape.reads[g]]
            counts = counts.reshape(*(1,) * (1 + groups[g].n_plates), len(counts))
            out[g] = group_sums(groups[g], counts, at.arguments[g])
        entries = [t.counts(masses[self.shape.reads[g]]) for g, t in self.cells.items()]
        for k in self.known.values():
            assert eta is not None
            evidence = evidence + torch.dot(k.f, eta.take(k.columns))
            entries.append(k.f)
        for i, f in enumerate(self.factors):
            if f.linear is not None:
                entries.append(f.linear.counts(sums[f"linear {i}"], masses[f.reads]))
        counted = {
            g: sums[f"mass of {g}"] if g in f.counted else masses[f.reads]
            for f in self.factors
            for g in f.normals
        }
        moments = {}
        for g in self.normals:
            moments[g], correction = self._over_rows(at, g, sums[g], counted[g])
            evidence = evidence + correction if isinstance(correction, Tensor) else evidence
        log_evidence = checked(evidence, mass, self.total) + self.base
        if entries:
            assert eta is not None
            out[NATURAL] = {"features": scattered(eta, self.columns, entries)}
        for g in self.normals:
            out[g] = {"moments": moments[g], "mass": counted[g]}
        largest = max((at.prepared[g].size for g in self.normals), default=0.0)
        noise = 2e-16 * self.total / self.N**0.5 * largest
        return Expectation(log_evidence, out, noise=noise)

    def _over_rows(
        self, at: At, g: int, collected: Tensor, mass: Tensor
    ) -> tuple[Tensor, Tensor | float]:
        """The moments of a Normal group from what chunks added, and what rounding cost, in nats."""
        rule, p = self.normals[g], at.prepared[g]
        return rule.over_rows(p, collected), rule.correction(p, collected, mass)


def outline_of_rows(graph: FactorGraph) -> tuple[FactorGraph, RowShape, Tensor | None] | Finding:
    """The distinct rows of a graph, their shape and how often each occurs, or why there are none."""
    shape = shape_of_rows(graph)
    if isinstance(shape, Finding):
        return shape
    weight = row_weights(graph, shape)
    if isinstance(weight, Finding):
        return weight
    for g in shape.rowwise:
        if reads_by_rows(graph.groups[g]):
            return why_not_constant(graph.groups[g])
    rows = distinct(graph, shape, weight)
    return rows.graph, shape, rows.counts


def _cells(group: Group, g: int, layout: Layout) -> Cells:
    """The table of a group of a layout, made once for the features of that."""
    assert layout.naturals is not None
    asked = (cells, g, group.n_plates, group.sizes[group.n_plates :])
    known = layout.naturals.remembered
    if asked not in known:
        known[asked] = cells(group, *layout.linears[g])
    found: Cells = known[asked]
    return found


def theta_of_linear(
    eta: Tensor | None, linear: RowFeatures | None
) -> tuple[Tensor, Tensor | None] | None:
    """What linear groups are evaluated with; None where there are none."""
    if linear is None:
        return None
    assert eta is not None
    return linear.thetas(eta)


def _factors(
    graph: FactorGraph,
    shape: RowShape,
    layout: Layout,
    N: int,
    reads: tuple[int, ...],
    groups: Sequence[int],
) -> RowFactors | Finding:
    """Groups that read the same latents and rows, or why no kernel serves them."""
    K, linears, lines = math.prod(shape.sizes[i] for i in reads), layout.linears, layout.lines
    pieces: list[Piece] = []
    normals: dict[int, NormalRows] = {}
    others: list[int] = []
    masks: dict[int, Tensor] = {}
    labels: list[Labels] = []
    for g in groups:
        group = graph.groups[g]
        if g in linears:
            part = pieces_of(group, linears[g][0], K)
            if part is None:
                return why_not_constant(group)
            pieces += part
            continue
        mask = group.mask
        single = len(group.members) == 1 and (mask is None or mask.shape[2] == 1)
        rule: NormalRows | None = None
        if g in lines and single and (mask is None or isinstance(lines[g], LaplaceRows)):
            rule = lines[g]
        elif single and (trials := as_trials(group, K, graph.all_data)) is not None:
            rule = trials
        elif varies(group):
            return why_not_constant(group)
        elif single:
            rule = rule_of(group, K, graph.all_data)
        if rule is None:
            known = Labels.of(group, K, N)
            if known is None:
                others.append(g)
            else:
                labels.append(known)
            continue
        normals[g] = rule
        if mask is not None:
            masks[g] = mask.reshape(-1).expand(N)
    linear = RowFeatures.of(pieces, N) if pieces else None
    return RowFactors(reads, K, linear, normals, tuple(others), masks, tuple(labels))
