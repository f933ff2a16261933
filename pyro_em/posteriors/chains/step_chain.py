r"""The E-step of a chain whose states are products, or whose moves change from step to step.

The state of a step holds all latents that later steps read: several latents, or the latest values of
one. What is local to a step is summed there,

    ℓ_t(z) = Σ_m Π_f f(z, m),     q(z_t, m_t) = γ_t(z_t) p(m_t | z_t, x_t),

messages move from step to step in stages (`pyro_em.posteriors.messages.moves`), and each group has its
sums from the marginals of what it reads. Where a latent has no value (before the first step, or at
steps that leave it out) the state holds its first one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, Self

import torch
from torch import Tensor

from pyro_em.densities.density import checked, scattered
from pyro_em.densities.layout import Layout
from pyro_em.densities.theta import At, Theta
from pyro_em.errors import Finding
from pyro_em.families.family import Statistics
from pyro_em.graph.factors import FactorGraph, Latent
from pyro_em.posteriors.block import Component
from pyro_em.posteriors.chains.chain_weights import sequence_weights
from pyro_em.posteriors.chains.sequence_block import SequenceBlock
from pyro_em.posteriors.chains.step_couples import StageGroups, stage_groups
from pyro_em.posteriors.chains.step_groups import StepGroups
from pyro_em.posteriors.contraction import log_sum_exp
from pyro_em.posteriors.messages.moves import Label
from pyro_em.posteriors.messages.smooth_moves import smooth_moves
from pyro_em.posteriors.messages.step_shape import (
    Locals,
    StepShape,
    absent_from,
    locals_of,
    step_graph,
    why_no_steps,
)
from pyro_em.posteriors.mixtures.product_states import flattened
from pyro_em.posteriors.quick import Outline
from pyro_em.updates.expectations.statistics import NATURAL, Expectation, Key


@dataclass(eq=False)
class StepChain(SequenceBlock):
    """A chain of product states.

    Attributes:
        graph: The collapsed graph; groups that read one state have one dimension for it.
        shape: What its groups read.
        of_steps: Groups that read one state or none.
        stages: Groups that read two, for each stage of a move.
        often: How often each sequence counts; once where None. # (B,)
        locals: Latents that are local to a step, those together that share factors.
        absent: Labels of the state that have no value at some steps, and these steps.
    """

    graph: FactorGraph
    shape: StepShape
    of_steps: StepGroups
    stages: tuple[StageGroups, ...]
    often: Tensor | None
    component: Component = field(init=False)
    theta: Theta = field(init=False)
    columns: Tensor = field(init=False)
    B: int = field(init=False)
    locals: tuple[Locals, ...] = field(init=False)
    absent: tuple[tuple[Label, Tensor], ...] = field(init=False)

    name: ClassVar[str] = "chain"
    words: ClassVar[str] = "chain kernel, by forward and backward messages in stages"

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
        of_steps = StepGroups.of(graph, unary, shape.free, sizes, layout, shape.T, False)
        if isinstance(of_steps, Finding):
            return of_steps
        stages = stage_groups(graph, shape, layout, often)
        if isinstance(stages, Finding):
            return stages
        return cls(graph, shape, of_steps, stages, often)

    def __post_init__(self) -> None:
        self.B = self.of_steps.B
        shape = self.shape
        parts = self.of_steps.columns
        parts += [columns for own in self.stages for columns in own.columns]
        device = self.graph.groups[0].value.device
        self.columns = torch.cat([torch.empty(0, dtype=torch.long, device=device), *parts])
        self.locals = locals_of(shape)
        self.absent = tuple((label, steps.to(device)) for label, steps in absent_from(shape))

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
        rows = [own.table(at) for own in self.stages]
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
        for stage, table, counts in zip(self.stages, rows, smoothed.counts, strict=True):
            entries += stage.sums(at, table, counts, sums)
        log_evidence = smoothed.log_evidence.to(top) + top + gain
        total = float(self.B * shape.T)
        evidence = checked(log_evidence, smoothed.gamma, total) + self.of_steps.base
        if entries:
            sums[NATURAL] = {"features": scattered(at.eta, self.columns, entries)}
        return Expectation(evidence, sums)

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


def _marginal(table: Tensor, labels: Sequence[Label], wanted: Sequence[Label]) -> Tensor:
    """Masses of some labels, as one dimension in their order. # (K, T, B)"""
    axes = [d for d, label in enumerate(labels) if label not in wanted]
    kept = [label for label in labels if label in wanted]
    table = table.sum(axes) if axes else table
    n = len(kept)
    table = table.permute(*(kept.index(label) for label in wanted), n, n + 1)
    return table.reshape(-1, *table.shape[-2:])
