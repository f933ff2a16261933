"""The groups of a chain that read two states: the tables of the stages of a move, and their sums."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pyro_em.densities.features import Cells, cells
from pyro_em.densities.layout import Layout
from pyro_em.densities.theta import At
from pyro_em.errors import Finding
from pyro_em.families.family import Statistics
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.posteriors.chains.step_groups import mask_of
from pyro_em.posteriors.messages.moves import Label, Stage
from pyro_em.posteriors.messages.smooth_moves import Table
from pyro_em.posteriors.messages.step_shape import StepShape
from pyro_em.updates.expectations.statistics import Key, group_sums, known_statistics


@dataclass(frozen=True, eq=False)
class StepCouple:
    """A group that reads two states.

    Attributes:
        number: Its number in the graph.
        group: The group.
        labels: What it reads, in the order of its dimensions.
        cells: Its table, where it is linear and the same everywhere.
        fixed: T(x), where no argument changes it and it is not linear.
        varies: Whether its table changes from step to step or from sequence to sequence.
        steps: The move of each member; None for 0, 1, 2, … to the last.
    """

    number: int
    group: Group
    labels: tuple[Label, ...]
    cells: Cells | None
    fixed: Statistics | None
    varies: bool
    steps: Tensor | None


@dataclass(frozen=True, eq=False)
class StageGroups:
    """The groups whose tables a stage multiplies by.

    Attributes:
        shape: The chain.
        stage: The stage.
        couples: The groups.
        sizes: Of the plates of the sequences.
        often: How often each sequence counts; once where None. # (B,)
        device: Where the numbers are.
    """

    shape: StepShape
    stage: Stage
    couples: tuple[StepCouple, ...]
    sizes: tuple[int, ...]
    often: Tensor | None
    device: torch.device

    @property
    def columns(self) -> list[Tensor]:
        """The elements of η, in the order of what `sums` collects for them."""
        return [c.cells.columns for c in self.couples if c.cells is not None]

    @cached_property
    def is_apart(self) -> bool:
        """Whether the groups are masked at different moves."""
        masks = [couple.group.mask for couple in self.couples]
        first = masks[0] if masks else None
        if first is None:
            return any(mask is not None for mask in masks)
        return any(mask is None or not torch.equal(mask, first) for mask in masks)

    @cached_property
    def weight(self) -> Tensor | None:
        """How much each move counts: masked ones do not. # (B or 1, T - 1 or 1)"""
        weight = None if self.often is None else self.often.unsqueeze(1)
        if not self.couples or self.is_apart or self.couples[0].group.mask is None:
            return weight
        first = self.couples[0]
        mask = mask_of(first.group).T.to(torch.float64)  # (B or 1, members or 1)
        if first.steps is not None and mask.shape[1] > 1:
            spread = mask.new_zeros(mask.shape[0], self.shape.T - 1)
            mask = spread.index_copy_(1, first.steps, mask)
        return mask if weight is None else mask * weight

    @cached_property
    def kinds(self) -> tuple[Tensor, Tensor] | None:
        """Which groups are in each kind of move, and the kind of each; None where all are in all.

        Returns:
            # (groups, kinds), (T - 1,)
        """
        if all(c.steps is None for c in self.couples):
            return None
        there = torch.ones(
            len(self.couples), self.shape.T - 1, dtype=torch.bool, device=self.device
        )
        for own, couple in zip(there, self.couples, strict=True):
            if couple.steps is not None:
                own.fill_(False)
                own[couple.steps] = True
        kinds, which = torch.unique(there, dim=1, return_inverse=True)
        return kinds, which

    def table(self, at: At) -> Table:
        """The numbers of the stage at some parameters."""
        full = self.shape.moves.shape(self.stage.table)
        if not self.couples:
            ones = torch.ones(1, 1, *full, dtype=torch.float64, device=self.device)
            return Table(ones, None, self.weight)
        logs = [self._log(couple, at) for couple in self.couples]
        if not self.is_apart and not any(c.varies for c in self.couples):
            return self._few(logs, full)
        total: Tensor | None = None
        for couple, log in zip(self.couples, logs, strict=True):
            if couple.steps is not None:
                spread = log.new_zeros(self.shape.T - 1, *log.shape[1:])
                log = log.expand(len(couple.steps), *log.shape[1:])
                log = spread.index_copy_(0, couple.steps, log)
            total = log if total is None else total + log
        assert total is not None
        sequences = math.prod(self.sizes) if self.is_apart else -1
        rows = total.exp().expand(self.shape.T - 1, sequences, *full)
        return Table(rows.contiguous(), None, self.weight)

    def _few(self, logs: Sequence[Tensor], full: tuple[int, ...]) -> Table:
        """The table where each group has one for all the moves that it is in."""
        if self.kinds is None:
            total = sum(logs[1:], logs[0])
            return Table(total.exp().expand(1, 1, *full).contiguous(), None, self.weight)
        kinds, which = self.kinds
        rows = []
        for kind in kinds.T.tolist():
            total = logs[0].new_zeros(1, 1, *full)
            for log, counts in zip(logs, kind, strict=True):
                total = total + log if counts else total
            rows.append(total)
        return Table(torch.cat(rows).exp(), which, self.weight)

    def _log(self, couple: StepCouple, at: At) -> Tensor:
        """Log densities of a group over the labels of the stage. # (moves or 1, B or 1, *or 1s)"""
        group, own, B = couple.group, couple.labels, math.prod(self.sizes)
        if couple.cells is not None:
            log_p = couple.cells.table(at.eta)
            rows, sequences = 1, 1
        elif group.observed or group.event_dims:
            log_p = group.log_density(at.arguments[couple.number])
            rows, sequences = len(group.members), B if group.n_plates else 1
        else:
            assert group.family is not None
            log_p = group.family.log_prob(group.value, at.arguments[couple.number])
            rows = log_p.shape[0]
            sequences = math.prod(log_p.shape[1 : 1 + group.n_plates])
            if sequences not in (1, B):
                log_p, sequences = log_p.expand(rows, *group.sizes), B
        table = log_p.to(torch.float64).reshape(rows, sequences, *self.shape.moves.shape(own))
        present = [label for label in self.stage.table if label in own]
        table = table.permute(0, 1, *(2 + own.index(label) for label in present))
        sizes = dict(zip(present, table.shape[2:], strict=True))
        return table.reshape(rows, sequences, *(sizes.get(label, 1) for label in self.stage.table))

    def sums(
        self, at: At, table: Table, counts: Tensor, sums: dict[Key, Statistics]
    ) -> list[Tensor]:
        """Collect the sums of all groups.

        Args:
            at: The parameters.
            table: As `table` gave it.
            counts: Expected counts of its cells.
            sums: Where the sums of groups that are not linear go.

        Returns:
            The counts of those that are.
        """
        entries = []
        for couple in self.couples:
            own, group = self._counts_of(couple, table, counts), couple.group
            if couple.cells is not None:
                entries.append(couple.cells.counts(own.sum((0, 1)).reshape(-1)))
                continue
            plates = self.sizes if own.shape[1] > 1 else (1,) * group.n_plates
            own = own.reshape(len(own), *(plates if group.n_plates else ()), *own.shape[2:])
            arguments = at.arguments[couple.number]
            sums[couple.number] = group_sums(group, own, arguments, couple.fixed, masked=True)
        return entries

    def _counts_of(self, couple: StepCouple, table: Table, counts: Tensor) -> Tensor:
        """Expected counts of what a group reads. # (members or 1, B or 1, *its labels)"""
        group, own = couple.group, couple.labels
        if couple.steps is not None and table.which is not None:
            used = torch.unique(table.which[couple.steps])
            counts = counts[used].sum(0, keepdim=True)
        elif couple.steps is not None and len(table.rows) > 1:
            counts = counts[couple.steps]
        if self.is_apart and group.mask is not None:
            mask = mask_of(group).to(counts)
            counts = counts * mask.reshape(*mask.shape, *(1,) * (counts.dim() - 2))
        if not couple.varies:
            counts = counts.sum((0, 1), keepdim=True)
        elif group.n_plates == 0:
            counts = counts.sum(1, keepdim=True)
        axes = [2 + d for d, label in enumerate(self.stage.table) if label not in own]
        counts = counts.sum(axes) if axes else counts
        present = [label for label in self.stage.table if label in own]
        return counts.permute(0, 1, *(2 + present.index(label) for label in own))


def stage_groups(
    graph: FactorGraph, shape: StepShape, layout: Layout, often: Tensor | None
) -> tuple[StageGroups, ...] | Finding:
    """The groups of each stage, or why one of them has no kernel.

    Args:
        graph: A collapsed graph.
        shape: What its groups read.
        layout: How they are evaluated.
        often: How often each sequence counts.
    """
    device = graph.groups[0].value.device
    every = torch.arange(shape.T - 1, device=device)
    couples: list[StepCouple] = []
    for g, reader in shape.couples.items():
        group, moves = graph.groups[g], (reader.steps - 1).to(device)
        if group.mask is not None and any(n != 1 for n in group.mask.shape[1 + group.n_plates :]):
            site = group.members[0]
            return Finding(f"site '{site}'", f"the mask of '{site}' reads a latent: no kernel")
        varies = group.observed or _varies(group)
        is_linear = g in layout.linears and not varies
        table = cells(group, *layout.linears[g]) if is_linear else None
        fixed = None if is_linear else known_statistics(group)
        steps = None if len(moves) == len(every) and bool((moves == every).all()) else moves
        couples.append(StepCouple(g, group, reader.labels, table, fixed, varies, steps))
    sizes = tuple(graph.dim_size(p) for p in shape.plates)
    return tuple(
        StageGroups(shape, stage, tuple(couples[f] for f in stage.factors), sizes, often, device)
        for stage in shape.moves.stages
    )


def _varies(group: Group) -> bool:
    """Whether a table changes from step to step or from sequence to sequence."""
    tensors = [group.value, *group.arguments.values()]
    return any(n != 1 for t in tensors for n in t.shape[: 1 + group.n_plates])
