r"""Chains of product states through tables of all cells: posterior, the most probable path, the filter.

What `pyro_em.posteriors.messages.steps` does for one latent per step and a history of one goes here for
several latents and longer histories, with the same stages as the kernel
(`pyro_em.posteriors.messages.moves`):

    γ_t ∝ α_t β_t,     δ_{s+1}(after) = max δ_s(before) a_s(table),     α_t for the filter,

the last two in logarithms, in which nothing is lost.

Source: Rabiner (1989), "A tutorial on hidden Markov models", sections III.B and V.A.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pyro_em.errors import Finding
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.posteriors.contraction import log_sum_exp
from pyro_em.posteriors.messages.log_stages import LogStage
from pyro_em.posteriors.messages.moves import Label
from pyro_em.posteriors.messages.smooth_moves import Table, smooth_each
from pyro_em.posteriors.messages.step_shape import Locals, Parts, absent_from, locals_of, step_parts
from pyro_em.tracing.sites import Role

_MOST = 2**26  # numbers of a table of all states at all steps

Tables = Sequence[Tensor]
Ring = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class ProductCells:
    """What the E-step of a chain of product states is made of; see `steps.StepCells`."""

    log_evidence: Tensor
    terms: list[tuple[tuple[str, ...], Tensor]]
    cells: list[Tensor]


@dataclass(frozen=True, eq=False)
class ProductSteps:
    """A graph as a chain of product states.

    Attributes:
        graph: The graph.
        of: Its groups in parts, and what they read.
        sizes: Of the latents' plates.
        locals: Latents that are local to a step.
        absent: Labels that have no value at some steps.
    """

    graph: FactorGraph
    of: Parts
    sizes: tuple[int, ...]
    locals: tuple[Locals, ...]
    absent: tuple[tuple[Label, Tensor], ...]

    @property
    def B(self) -> int:
        """Sequences."""
        return math.prod(self.sizes)

    # ------------------------------------------------------------------ tables

    def _table(self, tables: Tables, k: int, labels: Sequence[Label]) -> tuple[Tensor, Tensor]:
        """Log densities of a part and the steps of its members. # (steps, B, *labels or 1s)"""
        part, shape = self.of.parts[k], self.of.shape
        reader = shape.unary[k] if k in shape.unary else shape.couples[k]
        group, table = self.graph.groups[part.group], tables[part.group].to(torch.float64)
        if part.members is not None:
            table = table[list(part.members)]
        beyond = self._beyond(group)
        table = table.sum(beyond) if beyond else table
        own = reader.labels
        table = table.reshape(len(table), self.B, *shape.moves.shape(own))
        present = [label for label in labels if label in own]
        table = table.permute(0, 1, *(2 + own.index(label) for label in present))
        sizes = dict(zip(present, table.shape[2:], strict=True))
        table = table.reshape(*table.shape[:2], *(sizes.get(label, 1) for label in labels))
        return table, reader.steps.to(table.device)

    def _beyond(self, group: Group) -> list[int]:
        plates = group.dims[0][: group.n_plates]
        return [1 + d for d, plate in enumerate(plates) if plate not in self.of.shape.plates]

    def _sum(self, tables: Tables, parts: Sequence[int], labels: Sequence[Label], T: int) -> Tensor:
        """Log densities of some parts at every step, or at every move. # (T, B, *labels)"""
        sizes = self.of.shape.moves.shape(labels)
        device = tables[0].device
        out = torch.zeros(T, self.B, *sizes, dtype=torch.float64, device=device)
        for k in parts:
            table, steps = self._table(tables, k, labels)
            if k in self.of.shape.couples:
                steps = steps - 1
            out.index_add_(0, steps, table.expand(-1, -1, *sizes))
        return out

    def _without_absent(self, table: Tensor, labels: Sequence[Label]) -> Tensor:
        for label, steps in self.absent:
            if label in labels:
                axis = 2 + labels.index(label)
                rest = table.narrow(axis, 1, table.shape[axis] - 1)
                rest.index_fill_(0, steps.to(table.device), -math.inf)
        return table

    def _of_locals(self, tables: Tables) -> list[Tensor]:
        """Log densities of what reads local latents. # (T, B, *reads, *own) each"""
        T = self.of.shape.T
        out = []
        for own in self.locals:
            labels = (*own.reads, *own.own)
            out.append(self._without_absent(self._sum(tables, own.groups, labels, T), labels))
        return out

    def _of_state(self, tables: Tables, given: Sequence[Tensor], ring: Ring) -> Tensor:
        """Log densities of the state of each step, local latents eliminated. # (T, B, *state)"""
        shape = self.of.shape
        state, local = shape.moves.state, {k for own in self.locals for k in own.groups}
        total = self._sum(tables, [k for k in shape.unary if k not in local], state, shape.T)
        for own, table in zip(self.locals, given, strict=True):
            left = ring(table.flatten(2 + len(own.reads)))
            total += left.reshape(
                *left.shape[:2], *(n if v in own.reads else 1 for v, n in self._state_sizes())
            )
        return self._without_absent(total, state)

    def _state_sizes(self) -> list[tuple[Label, int]]:
        moves = self.of.shape.moves
        return list(zip(moves.state, moves.shape(moves.state), strict=True))

    def _of_stages(self, tables: Tables) -> list[Tensor]:
        """Log densities of each stage's tables at every move. # (T - 1, B, *labels)"""
        couples = list(self.of.shape.couples)
        return [
            self._sum(tables, [couples[f] for f in s.factors], s.table, self.of.shape.T - 1)
            for s in self.of.shape.moves.stages
        ]

    # ------------------------------------------------------------------ the posterior

    def cells(self, tables: Tables) -> ProductCells | None:
        """Evidence and cells; None where messages lose what may matter."""
        shape, moves = self.of.shape, self.of.shape.moves
        given = self._of_locals(tables)
        log_l = self._of_state(tables, given, log_sum_exp).reshape(shape.T, self.B, -1)
        top = log_l.amax(-1, keepdim=True)
        if not bool(torch.isfinite(top).all()):
            return None
        likelihood = (log_l - top).exp_().transpose(0, 1)
        rows, log_p = [], top.sum((0, 2))
        for log in self._of_stages(tables):
            largest = log.flatten(2).amax(-1)
            if not bool(torch.isfinite(largest).all()):
                return None
            log_p = log_p + largest.sum(0)
            rows.append(
                Table((log - largest.reshape(*largest.shape, *(1,) * (log.dim() - 2))).exp_())
            )
        smoothed = smooth_each(moves, likelihood, rows)
        assert smoothed.each is not None
        log_p = (log_p + smoothed.each).reshape(self.sizes)
        mass = smoothed.gamma.transpose(0, 1).reshape(shape.T, self.B, *moves.shape(moves.state))
        if not bool(torch.isfinite(log_p).all() & torch.isfinite(mass).all()):
            return None
        return self._laid_out(tables, log_p, mass, given, smoothed.counts)

    def _laid_out(
        self,
        tables: Tables,
        log_p: Tensor,
        mass: Tensor,
        given: Sequence[Tensor],
        counts: Sequence[Tensor],
    ) -> ProductCells:
        shape, groups = self.of.shape, self.graph.groups
        terms = [(shape.plates, log_p)]
        cells: list[Tensor] = [torch.empty(0)] * len(groups)
        found: dict[int, tuple[Tensor, Sequence[Label]]] = {}
        for own, table in zip(self.locals, given, strict=True):
            joint = self._joint(own, mass, table)
            found |= dict.fromkeys(own.groups, (joint, (*own.reads, *own.own)))
        couples = list(shape.couples)
        for stage, count in zip(shape.moves.stages, counts, strict=True):
            found |= {couples[f]: (count, stage.table) for f in stage.factors}
        for k, part in enumerate(self.of.parts):
            group = groups[part.group]
            if k in shape.free or group.role is Role.POINT:
                members = range(len(group.members)) if part.members is None else part.members
                table = tables[part.group].to(torch.float64)[list(members)]
                terms += [(group.dims[i], t) for i, t in zip(members, table, strict=True)]
                own_cells = torch.ones_like(table)
            else:
                reader = shape.unary[k] if k in shape.unary else shape.couples[k]
                steps = reader.steps - (1 if k in shape.couples else 0)
                joint, labels = found.get(k, (mass, shape.moves.state))
                one = marginal(joint, labels, reader.labels)[steps.to(joint.device)]
                one = one.reshape(len(one), *self.sizes, *one.shape[2:])
                for d in self._beyond(group):
                    one = one.unsqueeze(d)
                own_cells = one.expand(len(one), *group.sizes)
            if part.members is None:
                cells[part.group] = own_cells
                continue
            if not cells[part.group].numel():
                cells[part.group] = own_cells.new_zeros(len(group.members), *group.sizes)
            cells[part.group][list(part.members)] = own_cells
        total = torch.stack([t.sum() for _, t in terms]).sum()
        return ProductCells(total, terms, cells)

    def _joint(self, own: Locals, mass: Tensor, table: Tensor) -> Tensor:
        """Probabilities of local latents and what they read. # (T, B, *reads, *own)"""
        n = 2 + len(own.reads)
        share = torch.softmax(table.flatten(n), -1).nan_to_num(0.0)
        state = marginal(mass, self.of.shape.moves.state, own.reads)
        return (state.unsqueeze(-1) * share).reshape(table.shape)

    # ------------------------------------------------------------------ in logarithms

    def path(self, tables: Tables) -> Tensor:
        """A jointly most probable path: positions in supports. # (latents, *plates)"""
        shape, moves = self.of.shape, self.of.shape.moves
        given = self._of_locals(tables)
        log_l = self._of_state(tables, given, lambda t: t.amax(-1))
        laid = self._leaving(tables)
        likelihood, best = log_l.cpu().numpy(), log_l[0].cpu().numpy()
        came: list[np.ndarray] = []
        for t in range(1, shape.T):
            for stage in laid:
                scores = stage.times(best, t - 1)
                index = scores.argmax(-1)
                best = np.take_along_axis(scores, index[..., None], -1)[..., 0]
                best = best.reshape(stage.after)
                came.append(index.reshape(stage.after))
            best = best + likelihood[t]
        codes = np.zeros((len(shape.sizes), shape.T, self.B), dtype=np.int64)
        rows = np.arange(self.B)
        state = self._unravel(best.reshape(self.B, -1).argmax(-1), moves.state)
        local = [table.cpu().numpy() for table in given]
        for t in range(shape.T - 1, -1, -1):
            for label, value in state.items():
                if label[1] <= t:
                    codes[label[0], t - label[1]] = value
            for own, table in zip(self.locals, local, strict=True):
                chosen = table[(t, rows, *(state[label] for label in own.reads))]
                flat = chosen.reshape(self.B, -1).argmax(-1)
                for label, value in self._unravel(flat, own.own).items():
                    codes[label[0], t] = value
            if t == 0:
                break
            read = dict(state)
            for stage in reversed(laid):
                flat = came.pop()[(rows, *(read[label] for label in stage.of.after))]
                read |= self._unravel(flat, stage.gone)
            state = {(c, lag): read[c, lag + 1] for c, lag in moves.state}
        places = [self.of.names(name) for name in self.graph.latents]
        found = np.stack([codes[place] for place in places if place is not None])
        return torch.from_numpy(found).to(log_l.device).reshape(len(found), *self.sizes)

    def _unravel(self, flat: np.ndarray, labels: Sequence[Label]) -> dict[Label, np.ndarray]:
        sizes = self.of.shape.moves.shape(labels)
        return dict(zip(labels, np.unravel_index(flat, sizes), strict=True)) if sizes else {}

    def _leaving(self, tables: Tables) -> list[LogStage]:
        """The stages with their tables at every move."""
        logs = self._of_stages(tables)
        moves = self.of.shape.moves
        return [LogStage.of_stage(moves, s, log) for s, log in zip(moves.stages, logs, strict=True)]

    def forward(self, tables: Tables) -> dict[str, Tensor]:
        """p(latent | all factors up to its step) of every latent. # (*plates, K) each"""
        shape, moves = self.of.shape, self.of.shape.moves
        given = self._of_locals(tables)
        log_l = self._of_state(tables, given, log_sum_exp)
        laid, likelihood = self._leaving(tables), log_l.cpu().numpy()
        now, found = likelihood[0], np.empty_like(likelihood)
        axes = tuple(range(1, now.ndim))
        for t in range(shape.T):
            if t:
                for stage in laid:
                    scores = stage.times(now, t - 1)
                    now = np.logaddexp.reduce(scores, -1).reshape(stage.after)
                now = now + likelihood[t]
            now = now - np.logaddexp.reduce(now, axes, keepdims=True)
            found[t] = now
        mass = torch.from_numpy(found).to(log_l.device).exp()
        each = {
            c: marginal(mass, moves.state, [(c, 0)]) for c, h in enumerate(shape.histories) if h
        }
        for own, table in zip(self.locals, given, strict=True):
            joint = self._joint(own, mass, table)
            each |= {c: marginal(joint, (*own.reads, *own.own), [(c, 0)]) for c, _ in own.own}
        out = {}
        for name in self.graph.latents:
            place = self.of.names(name)
            assert place is not None
            table = each[place[0]][place[1]]
            out[name] = table.reshape(*self.sizes, table.shape[-1])
        return out

    def comes(self) -> dict[tuple[int, int], int]:
        """For each member of each group that reads latents the step at which it counts."""
        shape, out = self.of.shape, dict[tuple[int, int], int]()
        for k, reader in {**shape.unary, **shape.couples}.items():
            part = self.of.parts[k]
            members = range(len(reader.steps)) if part.members is None else part.members
            out |= {(part.group, i): t for i, t in zip(members, reader.steps.tolist(), strict=True)}
        return out


def product_steps(graph: FactorGraph) -> ProductSteps | None:
    """The chain of product states that a graph is, or None; by looking only, once."""
    if "product steps" not in graph.remembered:
        graph.remembered["product steps"] = _look(graph)
    found: ProductSteps | None = graph.remembered["product steps"]
    return found


def _look(graph: FactorGraph) -> ProductSteps | None:
    for group in graph.groups:
        if group.nested is not None or not group.is_unscaled:
            return None
        if group.role is Role.POINT and any(d in graph.latents for ds in group.dims for d in ds):
            return None
    found = step_parts(graph, True)
    if isinstance(found, Finding):
        return None
    shape = found.shape
    sizes = tuple(graph.dim_size(p) for p in shape.plates)
    numbers = max(
        shape.moves.P, *(math.prod(shape.moves.shape(s.table)) for s in shape.moves.stages)
    )
    numbers = max(
        numbers, *(math.prod(shape.moves.shape((*v.reads, *v.own))) for v in locals_of(shape)), 1
    )
    if numbers * shape.T * math.prod(sizes) > _MOST:
        return None
    return ProductSteps(graph, found, sizes, locals_of(shape), absent_from(shape))


def marginal(table: Tensor, labels: Sequence[Label], wanted: Sequence[Label]) -> Tensor:
    """Probabilities of some labels, in their order. # (T, B, *wanted)"""
    axes = [2 + d for d, label in enumerate(labels) if label not in wanted]
    kept = [label for label in labels if label in wanted]
    table = table.sum(axes) if axes else table
    return table.permute(0, 1, *(2 + kept.index(label) for label in wanted))
