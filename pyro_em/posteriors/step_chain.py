r"""The E-step of a chain whose states are products, or whose moves change from step to step.

The state of a step holds all latents that later steps read: several latents, or the latest values of
one. What is local to a step is summed there,

    ℓ_t(z) = Σ_m Π_f f(z, m),     q(z_t, m_t) = γ_t(z_t) p(m_t | z_t, x_t),

messages move from step to step in stages (`pyro_em.posteriors.moves`), and each group has its sums from
the marginals of what it reads. Where a latent has no value (before the first step, or at steps that
leave it out) the state holds its first one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import ClassVar, Self

import torch
from torch import Tensor

from pyro_em.densities.density import NormalRows, checked, scattered
from pyro_em.densities.features import Cells, cells
from pyro_em.densities.layout import Layout
from pyro_em.densities.theta import At, Theta
from pyro_em.errors import Finding
from pyro_em.families.family import Statistics
from pyro_em.graph.factors import FactorGraph, Group, Latent
from pyro_em.posteriors.block import Component, Values
from pyro_em.posteriors.chain_weights import sequence_weights
from pyro_em.posteriors.contraction import log_sum_exp
from pyro_em.posteriors.moves import Label, Stage
from pyro_em.posteriors.per_sequence import PerSequence
from pyro_em.posteriors.product_states import flattened
from pyro_em.posteriors.quick import Outline, QuickBlock
from pyro_em.posteriors.smooth_moves import Smoothed, Table, smooth_moves
from pyro_em.posteriors.step_groups import StepGroups, mask_of
from pyro_em.posteriors.step_shape import (
    Locals,
    StepShape,
    absent_from,
    locals_of,
    step_graph,
    why_no_steps,
)
from pyro_em.updates.statistics import NATURAL, Expectation, Key, group_sums, known_statistics


@dataclass(frozen=True, eq=False)
class _Couple:
    """A group that reads two states.

    Attributes:
        group: Its number.
        stage: The stage of a move that it is a factor of.
        cells: Its table, where it is linear and the same everywhere.
        fixed: T(x), where no argument changes it and it is not linear.
        varies: Whether its table changes from step to step or from sequence to sequence.
        steps: The move of each member; None for 0, 1, 2, … to the last.
    """

    group: int
    stage: int
    cells: Cells | None
    fixed: Statistics | None
    varies: bool
    steps: Tensor | None


@dataclass(eq=False)
class StepChain(QuickBlock):
    """A chain of product states.

    Attributes:
        graph: The collapsed graph; groups that read one state have one dimension for it.
        shape: What its groups read.
        of_steps: Groups that read one state or none.
        couples: Groups that read two.
        often: How often each sequence counts; once where None. # (B,)
        locals: Latents that are local to a step, those together that share factors.
        absent: Labels of the state that have no value at some steps, and these steps.
        apart: For each stage whether its groups count at different moves.
    """

    graph: FactorGraph
    shape: StepShape
    of_steps: StepGroups
    couples: tuple[_Couple, ...]
    often: Tensor | None
    component: Component = field(init=False)
    theta: Theta = field(init=False)
    columns: Tensor = field(init=False)
    locals: tuple[Locals, ...] = field(init=False)
    absent: tuple[tuple[Label, Tensor], ...] = field(init=False)
    apart: tuple[bool, ...] = field(init=False)

    name: ClassVar[str] = "chain"
    words: ClassVar[str] = "chain kernel, by forward and backward messages of product states"

    @classmethod
    def glance(cls, latents: Mapping[str, Latent]) -> Finding | None:
        """See `pyro_em.posteriors.quick.QuickBlock.glance`."""
        return why_no_steps(latents)

    @classmethod
    def outline(cls, component: Component) -> Outline[Self] | Finding:
        """See `pyro_em.posteriors.quick.QuickBlock.outline`."""
        found = step_graph(component.graph)
        if isinstance(found, Finding):
            return found
        graph, shape = found.graph, found.shape
        often = sequence_weights(graph)
        if isinstance(often, Finding):
            return often
        unary = list(shape.unary)
        flat = flattened(replace(graph, groups=tuple(graph.groups[g] for g in unary))).groups
        by_number = dict(zip(unary, flat, strict=True))
        groups = tuple(by_number.get(g, group) for g, group in enumerate(graph.groups))
        graph = replace(graph, groups=groups)
        sizes = {g: math.prod(shape.moves.shape(r.labels)) for g, r in shape.unary.items()}
        finish = partial(cls.of, graph, shape, often, sizes)
        return Outline(graph, shape.eligible(graph), finish, found.origin, sizes)

    @classmethod
    def of(
        cls,
        graph: FactorGraph,
        shape: StepShape,
        often: Tensor | None,
        sizes: Mapping[int, int],
        layout: Layout,
    ) -> Self | Finding:
        """The kernel of a chain, still without its parameters, or why there is none.

        Args:
            graph: A collapsed graph; groups that read one state have one dimension for it.
            shape: What its groups read.
            often: How often each sequence counts.
            sizes: How many values each group reads that reads one state.
            layout: How groups are evaluated.
        """
        unary = {g: reader.steps for g, reader in shape.unary.items()}
        T = shape.T
        of_steps = StepGroups.of(graph, unary, shape.free, sizes, layout, T, False)
        if isinstance(of_steps, Finding):
            return of_steps
        stages = {
            list(shape.couples)[f]: s for s, st in enumerate(shape.moves.stages) for f in st.factors
        }
        couples = []
        for g, reader in shape.couples.items():
            group, moves = graph.groups[g], (reader.steps - 1).to(graph.groups[g].value.device)
            is_whole = len(moves) == T - 1 and bool(
                (moves == torch.arange(T - 1, device=moves.device)).all()
            )
            varies = group.observed or _varies(group)
            table = None
            if g in layout.linears and not varies:
                table = cells(group, *layout.linears[g])
            fixed = None if table is not None else known_statistics(group)
            couples.append(_Couple(g, stages[g], table, fixed, varies, None if is_whole else moves))
            if group.mask is not None and any(
                n != 1 for n in group.mask.shape[1 + group.n_plates :]
            ):
                what = f"the mask of '{group.members[0]}' reads a latent: no kernel"
                return Finding(f"site '{group.members[0]}'", what)
        return cls(graph, shape, of_steps, tuple(couples), often)

    def __post_init__(self) -> None:
        shape = self.shape
        parts = self.of_steps.columns
        parts += [c.cells.columns for c in self.couples if c.cells is not None]
        device = self.graph.groups[0].value.device
        self.columns = torch.cat([torch.empty(0, dtype=torch.long, device=device), *parts])
        self.locals = locals_of(shape)
        self.absent = tuple((label, steps.to(device)) for label, steps in absent_from(shape))
        own = [[c for c in self.couples if c.stage == s] for s in range(len(shape.moves.stages))]
        self.apart = tuple(_count_apart([self.graph.groups[c.group] for c in each]) for each in own)

    @property
    def normals(self) -> Mapping[int, NormalRows]:  # type: ignore[override]
        """Normal groups that are evaluated by matrix products."""
        return self.of_steps.normals

    @property
    def B(self) -> int:
        """Sequences."""
        return self.of_steps.B

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
        shape, often, moves = self.shape, self.often, self.shape.moves
        features = self.of_steps.features(at)  # both halves of the E-step need them
        tables = dict(self.of_steps.tables(at, features))
        given = [self._local_table(own, tables) for own in self.locals]
        log_l = self._log_likelihood(tables, given)
        tops = log_l.amax(0)
        top = tops.sum() if often is None else (tops * often).sum()
        likelihood = log_l.sub_(tops).exp_().permute(2, 1, 0)  # (B, T, P)
        rows = [self._stage_table(s, at) for s in range(len(moves.stages))]
        smoothed = smooth_moves(moves, likelihood, rows, often)
        mass = smoothed.gamma.permute(2, 1, 0)  # (P, T, B)
        mass = mass if often is None else mass * often
        mass = mass.reshape(*moves.shape(moves.state), shape.T, self.B)
        beside = [
            self._local_mass(own, mass, table)
            for own, table in zip(self.locals, given, strict=True)
        ]

        def masses(g: int) -> Tensor:
            labels = shape.unary[g].labels
            for own, joint in zip(self.locals, beside, strict=True):
                if g in own.groups:
                    return _marginal(joint, (*own.reads, *own.own), labels)
            return _marginal(mass, moves.state, labels)

        sums: dict[Key, Statistics] = {}
        entries, gain = self.of_steps.sums(at, features, masses, sums)
        entries += self._couple_sums(at, rows, smoothed, sums)
        log_evidence = smoothed.log_evidence.to(top) + top + gain
        total = float(self.B * shape.T)
        evidence = checked(log_evidence, smoothed.gamma, total) + self.of_steps.base
        if entries:
            sums[NATURAL] = {"features": scattered(at.eta, self.columns, entries)}
        return Expectation(evidence, sums)

    # ------------------------------------------------------------------ one state

    def _log_likelihood(self, tables: Mapping[int, Tensor], given: Sequence[Tensor]) -> Tensor:
        """Log densities that read one state, summed per step. # (P, T, B)"""
        shape, moves, out = self.shape, self.shape.moves, list[Tensor]()
        by_labels: dict[tuple[Label, ...], Tensor] = {}
        local = {g for own in self.locals for g in own.groups}
        for g, table in tables.items():
            if g not in local:
                labels = shape.unary[g].labels
                by_labels[labels] = self.of_steps.add(by_labels.get(labels), g, table, shape.T)
        for own, table in zip(self.locals, given, strict=True):
            k = math.prod(moves.shape(own.reads))
            summed = log_sum_exp(table.reshape(k, -1, *table.shape[-2:]).movedim(1, -1))
            before = by_labels.get(own.reads)
            by_labels[own.reads] = summed if before is None else before + summed
        for labels, table in by_labels.items():
            out.append(self._laid_out(table, labels, moves.state))
        out.sort(key=lambda t: -t.numel())
        full = (*moves.shape(moves.state), shape.T, self.B)
        zeros = torch.zeros(full, dtype=torch.float64, device=self.columns.device)
        total = zeros if not out else out[0] if out[0].shape == full else zeros + out[0]
        for more in out[1:]:
            total = total + more
        total = self._without_absent(total, moves.state)
        return total.reshape(moves.P, shape.T, self.B)

    def _laid_out(self, table: Tensor, labels: Sequence[Label], target: Sequence[Label]) -> Tensor:
        """A table over some labels, over others too. # (*target or 1s, T, B)"""
        sizes = self.shape.moves.shape(labels)
        present = [label for label in target if label in labels]
        order = [labels.index(label) for label in present]
        table = table.reshape(*sizes, *table.shape[1:])
        table = table.permute(*order, len(sizes), len(sizes) + 1)
        own = [sizes[labels.index(v)] if v in labels else 1 for v in target]
        return table.reshape(*own, *table.shape[-2:])

    def _without_absent(self, table: Tensor, labels: Sequence[Label]) -> Tensor:
        """Impossible where a latent that is not there has another value than the first."""
        for label, steps in self.absent:
            if label in labels:
                if table.dim() == 0 or not table.is_contiguous():
                    table = table.contiguous()
                axis = labels.index(label)
                rest = table.narrow(axis, 1, table.shape[axis] - 1)
                rest.index_fill_(-2, steps, -math.inf)
        return table

    def _local_table(self, own: Locals, tables: Mapping[int, Tensor]) -> Tensor:
        """Log densities of the groups that read local latents. # (*reads, *own, T, B)"""
        shape, total = self.shape, None
        target = (*own.reads, *own.own)
        full = (*shape.moves.shape(target), shape.T, self.B)
        for g in own.groups:
            table = self.of_steps.add(None, g, tables[g], shape.T)
            table = self._laid_out(table, shape.unary[g].labels, target)
            total = table if total is None else total + table
        assert total is not None
        total = total.expand(full).clone() if total.shape != full else total.clone()
        return self._without_absent(total, target)

    def _local_mass(self, own: Locals, mass: Tensor, table: Tensor) -> Tensor:
        """Posterior masses of local latents and what they read. # (*reads, *own, T, B)"""
        n, m = len(own.reads), len(own.own)
        flat = table.flatten(n, n + m - 1) if m > 1 else table
        given = torch.softmax(flat, n).nan_to_num(0.0)
        state = _marginal(mass, self.shape.moves.state, own.reads)
        state = state.reshape(*self.shape.moves.shape(own.reads), 1, *mass.shape[-2:])
        return (state * given).reshape(table.shape)

    # ------------------------------------------------------------------ two states

    def _stage_table(self, s: int, at: At) -> Table:
        """The numbers of a stage."""
        shape, stage = self.shape, self.shape.moves.stages[s]
        parts = [c for c in self.couples if c.stage == s]
        T, labels = shape.T, stage.table
        weight = self._weight([] if self.apart[s] else parts)
        full = shape.moves.shape(labels)
        if not parts:
            ones = torch.ones(1, 1, *full, dtype=torch.float64, device=self.columns.device)
            return Table(ones, None, weight)
        logs = [self._couple_table(c, at, labels) for c in parts]
        if not any(c.varies for c in parts) and not self.apart[s]:
            return _few_tables(parts, logs, T, full, weight)
        total: Tensor | None = None
        for couple, log in zip(parts, logs, strict=True):
            if couple.steps is not None:
                spread = log.new_zeros(T - 1, *log.shape[1:])
                log = spread.index_copy_(
                    0, couple.steps, log.expand(len(couple.steps), *log.shape[1:])
                )
            total = log if total is None else total + log
        assert total is not None
        sequences = self.B if self.apart[s] else -1
        return Table(total.exp().expand(T - 1, sequences, *full).contiguous(), None, weight)

    def _couple_table(self, couple: _Couple, at: At, labels: Sequence[Label]) -> Tensor:
        """Log densities of a group, over the labels of its stage.

        Returns:
            # (moves or 1, B or 1, *labels or 1s)
        """
        group, own = self.graph.groups[couple.group], self.shape.couples[couple.group].labels
        if couple.cells is not None:
            log_p = couple.cells.table(at.eta)
            rows, sequences = 1, 1
        elif group.observed or group.event_dims:
            log_p = group.log_density(at.arguments[couple.group])
            rows, sequences = len(group.members), self.B if group.n_plates else 1
        else:
            assert group.family is not None
            log_p = group.family.log_prob(group.value, at.arguments[couple.group])
            rows = log_p.shape[0]
            sequences = math.prod(log_p.shape[1 : 1 + group.n_plates])
            if sequences not in (1, self.B):
                log_p, sequences = log_p.expand(rows, *group.sizes), self.B
        table = log_p.to(torch.float64).reshape(rows, sequences, *self.shape.moves.shape(own))
        present = [label for label in labels if label in own]
        table = table.permute(0, 1, *(2 + own.index(label) for label in present))
        sizes = dict(zip(present, table.shape[2:], strict=True))
        return table.reshape(rows, sequences, *(sizes.get(label, 1) for label in labels))

    def _weight(self, parts: Sequence[_Couple]) -> Tensor | None:
        """How much each move counts: masked ones do not. # (B or 1, T - 1 or 1)"""
        weight = None if self.often is None else self.often.unsqueeze(1)
        for couple in parts[:1]:
            group = self.graph.groups[couple.group]
            if group.mask is None:
                continue
            mask = mask_of(group).T.to(torch.float64)  # (B or 1, members or 1)
            if couple.steps is not None and mask.shape[1] > 1:
                spread = mask.new_zeros(mask.shape[0], self.shape.T - 1)
                mask = spread.index_copy_(1, couple.steps, mask)
            weight = mask if weight is None else mask * weight
        return weight

    def _couple_sums(
        self, at: At, rows: Sequence[Table], smoothed: Smoothed, sums: dict[Key, Statistics]
    ) -> list[Tensor]:
        """Sums of the groups that read two states; the counts of those that are linear."""
        entries = []
        for couple in self.couples:
            group, table = self.graph.groups[couple.group], rows[couple.stage]
            stage = self.shape.moves.stages[couple.stage]
            counts = self._counts_of(couple, stage, table, smoothed.counts[couple.stage])
            if couple.cells is not None:
                entries.append(couple.cells.counts(counts.sum((0, 1)).reshape(-1)))
                continue
            plates = self.of_steps.plates if counts.shape[1] > 1 else (1,) * group.n_plates
            plates = plates if group.n_plates else ()
            counts = counts.reshape(len(counts), *plates, *counts.shape[2:])
            arguments = at.arguments[couple.group]
            sums[couple.group] = group_sums(group, counts, arguments, couple.fixed, masked=True)
        return entries

    def _counts_of(self, couple: _Couple, stage: Stage, table: Table, counts: Tensor) -> Tensor:
        """Expected counts of what a group reads. # (members or 1, B or 1, *its labels)"""
        own = self.shape.couples[couple.group].labels
        if table.which is None and len(table.rows) > 1:
            counts = counts if couple.steps is None else counts[couple.steps]
        elif table.which is not None and couple.steps is not None:
            used = torch.unique(table.which[couple.steps])
            counts = counts[used].sum(0, keepdim=True)
        group = self.graph.groups[couple.group]
        if self.apart[couple.stage] and group.mask is not None:
            mask = mask_of(group).to(counts)
            counts = counts * mask.reshape(*mask.shape, *(1,) * (counts.dim() - 2))
        if not couple.varies:
            counts = counts.sum((0, 1), keepdim=True)
        elif group.n_plates == 0:
            counts = counts.sum(1, keepdim=True)
        axes = [2 + d for d, label in enumerate(stage.table) if label not in own]
        counts = counts.sum(axes) if axes else counts
        present = [label for label in stage.table if label in own]
        return counts.permute(0, 1, *(2 + present.index(label) for label in own))


def _few_tables(
    parts: Sequence[_Couple],
    logs: Sequence[Tensor],
    T: int,
    full: tuple[int, ...],
    weight: Tensor | None,
) -> Table:
    """The table of groups each of which has one table for all the moves that it is in."""
    if all(c.steps is None for c in parts):
        total = torch.stack(torch.broadcast_tensors(*logs)).sum(0) if len(logs) > 1 else logs[0]
        return Table(total.exp().expand(1, 1, *full).contiguous(), None, weight)
    there = torch.ones(len(parts), T - 1, dtype=torch.bool, device=logs[0].device)
    for own, couple in zip(there, parts, strict=True):
        if couple.steps is not None:
            own.fill_(False)
            own[couple.steps] = True
    kinds, which = torch.unique(there, dim=1, return_inverse=True)
    rows = []
    for kind in kinds.T.tolist():
        total = logs[0].new_zeros(1, 1, *full)
        for log, counts in zip(logs, kind, strict=True):
            total = total + log if counts else total
        rows.append(total)
    return Table(torch.cat(rows).exp(), which, weight)


def _marginal(table: Tensor, labels: Sequence[Label], wanted: Sequence[Label]) -> Tensor:
    """Masses of some labels, as one dimension in their order. # (K, T, B)"""
    axes = [d for d, label in enumerate(labels) if label not in wanted]
    kept = [label for label in labels if label in wanted]
    table = table.sum(axes) if axes else table
    n = len(kept)
    table = table.permute(*(kept.index(label) for label in wanted), n, n + 1)
    return table.reshape(-1, *table.shape[-2:])


def _varies(group: Group) -> bool:
    """Whether a table changes from step to step or from sequence to sequence."""
    tensors = [group.value, *group.arguments.values()]
    return any(n != 1 for t in tensors for n in t.shape[: 1 + group.n_plates])


def _count_apart(groups: Sequence[Group]) -> bool:
    """Whether groups are masked at different moves."""
    masks = [group.mask for group in groups]
    first = masks[0] if masks else None
    if first is None:
        return any(mask is not None for mask in masks)
    return any(mask is None or not torch.equal(mask, first) for mask in masks)
