r"""Smoothing of chains whose states are products, by messages that move in stages.

A state is a product of several latents, or of the latest values of one. From one step to the next each
stage multiplies by a table of some of the labels and sums those that nothing reads any more,

    x_{s+1}(after) = Σ x_s(before) a_s(table).

One latent takes a single stage, α_t(j) ∝ ℓ_t(j) Σ_i α_{t−1}(i) A_t(i, j). Independent chains take
one each, which is the product with A ⊗ B without A ⊗ B; a history of two is one stage of K³ products
that moves (z_{t−2}, z_{t−1}) to (z_{t−1}, z_t). The expected counts of a stage's cells are

    n_s(cell) = Σ_t Σ x_s(before) a_s(cell) w_{s+1}(after),     w_S = ℓ_t β_t / c_t,

with w going back through the same stages. Tables may be the same at all steps or not.

Three ways: compiled loops (numba), products of matrices of the whole state on two levels (few states),
one step after the other for all sequences.

Source: Rabiner (1989), "A tutorial on hidden Markov models", section V.A; Ghahramani and Jordan
(1997), "Factorial hidden Markov models", appendix B, for stages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np
import torch
from torch import Tensor

from pyro_em.posteriors import forward_backward
from pyro_em.posteriors.forward_backward import smooth
from pyro_em.posteriors.varying import varying_neighbours

Label = tuple[int, int]  # a latent of a step, by number, and how many steps before the present one

_DENSE = 16  # what a product in the runs of stages costs more than one with the matrix of a move

_FEW = 256  # states up to which the matrix of a move that all share serves without compiled loops

_FEWER = 32  # the same where each move has its own

_CELLS = 2**26  # numbers of all matrices of whole moves, at most

_AT_ONCE = 2**18  # numbers of messages whose counts are summed at once


def in_order(labels: Sequence[Label] | set[Label]) -> tuple[Label, ...]:
    """Labels as the dimensions of messages and tables have them: by latent, older ones first."""
    return tuple(sorted(labels, key=lambda label: (label[0], -label[1])))


@dataclass(frozen=True)
class Stage:
    """A product with a table, and a sum.

    Attributes:
        before: Labels of the message that comes in.
        table: Labels of the table.
        after: Labels of the message that goes out.
        factors: Numbers of the factors that the table is made of.
    """

    before: tuple[Label, ...]
    table: tuple[Label, ...]
    after: tuple[Label, ...]
    factors: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Moves:
    """How messages go from one step to the next; `Moves.of` makes one.

    Attributes:
        sizes: How many values each latent of a step has.
        stages: One after the other.
    """

    sizes: tuple[int, ...]
    stages: tuple[Stage, ...]

    @classmethod
    def of(
        cls, sizes: Sequence[int], histories: Sequence[int], factors: Sequence[set[Label]]
    ) -> Moves:
        """The stages of some factors, each latent summed where that costs least.

        Args:
            sizes: How many values each latent has.
            histories: How many of its latest values the state holds, at least one each.
            factors: The labels that each factor reads.

        Example:
            >>> pair = Moves.of((2, 3), (1, 1), [{(0, 1), (0, 0)}, {(1, 1), (1, 0)}])
            >>> [stage.table for stage in pair.stages]
            [((0, 1), (0, 0)), ((1, 1), (1, 0))]
        """
        state = {(c, lag + 1) for c, h in enumerate(histories) for lag in range(h)}
        goal = {(c, lag) for c, h in enumerate(histories) for lag in range(h)}
        left, stages = dict(enumerate(factors)), []

        def read(label: Label) -> set[Label]:
            return {label}.union(*(own for own in left.values() if label in own))

        def cost(label: Label) -> int:
            return math.prod(sizes[c] for c, _ in state | read(label))

        while leaving := in_order(state - goal):
            chosen = min(leaving, key=cost)
            taken = tuple(f for f, own in left.items() if chosen in own)
            table: set[Label] = set().union(*(left.pop(f) for f in taken))
            after = (state | table).intersection(goal.union(*left.values()))
            table |= state - after  # what no factor reads is free, both where it goes
            if not after - goal:  # and where it comes from
                table, after = table | (goal - after), goal
            stages.append(Stage(in_order(state), in_order(table), in_order(after), taken))
            state = after
        return cls(tuple(sizes), tuple(stages))

    def shape(self, labels: Sequence[Label]) -> tuple[int, ...]:
        """How many values some labels have."""
        return tuple(self.sizes[c] for c, _ in labels)

    @property
    def state(self) -> tuple[Label, ...]:
        """The labels of the state."""
        return self.stages[-1].after

    @cached_property
    def P(self) -> int:
        """How many values the state has."""
        return math.prod(self.shape(self.state))

    @cached_property
    def cells(self) -> int:
        """Products of one move."""
        return sum(math.prod(self.shape(in_order({*s.before, *s.table}))) for s in self.stages)

    @cached_property
    def places(self) -> tuple[tuple[Label, ...], Tensor, Tensor]:
        """All labels of a move, and which states of both its ends each of their values is of."""
        labels = in_order(
            {*self.stages[0].before, *self.state}.union(*(s.table for s in self.stages))
        )
        numbers = torch.arange(math.prod(self.shape(labels))).reshape(self.shape(labels))
        index = dict(zip(labels, torch.unravel_index(numbers, self.shape(labels)), strict=True))

        def flat(own: Sequence[Label]) -> Tensor:
            out = torch.zeros_like(numbers)
            for label in own:
                out = out * self.sizes[label[0]] + index[label]
            return out.reshape(-1)

        return labels, flat(self.stages[0].before), flat(self.state)

    @cached_property
    def runs(self) -> _Runs:
        """The stages as compiled loops take them."""
        return _Runs.of(self)


@dataclass(frozen=True, eq=False)
class _Runs:
    """Stages as lists of runs; see `pyro_em.posteriors.numba_moves`."""

    runs: np.ndarray
    begins: np.ndarray
    kinds: np.ndarray
    inner: np.ndarray
    sizes: np.ndarray

    @classmethod
    def of(cls, moves: Moves) -> _Runs:
        found: list[np.ndarray] = []
        kinds, inner = [], []
        for stage in moves.stages:
            along = stage.after[-1]
            is_last = all(
                along not in own or along == own[-1] for own in (stage.before, stage.table)
            )
            outer = list(in_order({*stage.before, *stage.table}))
            if is_last:  # else runs of length one
                outer.remove(along)
            index = [range(moves.sizes[c]) for c, _ in outer]
            places = np.array(list(product(*index)), dtype=np.int64).reshape(-1, len(outer))

            def flat(
                own: Sequence[Label], outer: Sequence[Label] = outer, places: np.ndarray = places
            ) -> np.ndarray:
                out = np.zeros(len(places), dtype=np.int64)
                for label in own:
                    here = places[:, outer.index(label)] if label in outer else 0
                    out = out * moves.sizes[label[0]] + here
                return out

            found.append(np.stack([flat(stage.after), flat(stage.table), flat(stage.before)]))
            is_moved = is_last and along in stage.before
            kinds.append(0 if not is_moved else 2 if along in stage.table else 1)
            inner.append(moves.sizes[along[0]] if is_last else 1)
        begins = np.cumsum([0, *(f.shape[1] for f in found)])
        sizes = [stage.before for stage in moves.stages] + [moves.state]
        return cls(
            np.ascontiguousarray(np.concatenate(found, 1)),
            begins.astype(np.int64),
            np.array(kinds, dtype=np.int64),
            np.array(inner, dtype=np.int64),
            np.array([math.prod(moves.shape(labels)) for labels in sizes], dtype=np.int64),
        )


@dataclass(frozen=True, eq=False)
class Table:
    """The numbers of a stage.

    Attributes:
        rows: Non-negative; the sequences share one where there is one. # (rows, B or 1, *labels)
        which: The row of each move; None where all moves share one. # (T - 1,)
        weight: How much each move counts; one each where None. # (B or 1, T - 1 or 1)
    """

    rows: Tensor
    which: Tensor | None = None
    weight: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Smoothed:
    """What smoothing finds.

    Attributes:
        gamma: Posterior marginals. # (B, T, P)
        counts: For each stage the expected counts of its table's cells. # like the rows of tables
        log_evidence: In nats; NaN where a step's mass nearly underflows. # ()
    """

    gamma: Tensor
    counts: tuple[Tensor, ...]
    log_evidence: Tensor


def smooth_moves(
    moves: Moves, likelihood: Tensor, tables: Sequence[Table], often: Tensor | None = None
) -> Smoothed:
    """Posterior marginals, expected counts and the log evidence of all sequences.

    Args:
        moves: The stages.
        likelihood: ℓ, each row divided by its maximum; the first row holds the initial probabilities
            too. # (B, T, P)
        tables: One for each stage.
        often: How often the log evidence of each sequence counts; once where None. # (B,)

    Example:
        >>> A = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64)
        >>> l = torch.tensor([[[0.5, 0.5], [1.0, 0.0]]], dtype=torch.float64)
        >>> moves = Moves.of((2,), (1,), [{(0, 1), (0, 0)}])
        >>> found = smooth_moves(moves, l, [Table(A.reshape(1, 1, 2, 2))])
        >>> found.gamma[0, 0], found.log_evidence.exp()
        (tensor([0.8182, 0.1818], dtype=torch.float64), tensor(0.5500, dtype=torch.float64))
    """
    B, T, P = likelihood.shape
    compiles = forward_backward.compiles(B * T, likelihood.device)
    is_dense = (_DENSE * moves.cells >= P * P) if compiles else (P <= _FEW)
    if is_dense and _are_equal(tables):
        A = _matrices(moves, tables)[0, 0]
        gamma, xi, log_evidence = smooth(likelihood, A, tables[0].weight, often)
        return Smoothed(gamma, tuple(_cells_of(moves, xi[None, None])), log_evidence)
    if compiles:
        return _by_numba(moves, likelihood, tables, often)
    few = P <= _FEWER and B * T * P * P <= _CELLS
    found = _of_matrices(moves, likelihood, tables, often) if few else None
    return _step_by_step(moves, likelihood, tables, often) if found is None else found


def _are_equal(tables: Sequence[Table]) -> bool:
    """Whether all moves are the same, and count as often in each stage."""
    same = all(len(t.rows) == 1 and t.rows.shape[1] == 1 for t in tables)
    return same and all(t.weight is tables[0].weight for t in tables)


def _by_numba(
    moves: Moves, likelihood: Tensor, tables: Sequence[Table], often: Tensor | None
) -> Smoothed:
    from pyro_em.posteriors.numba_moves import smooth_moves as compiled

    B, T, _ = likelihood.shape
    likelihood = likelihood.contiguous()
    rows = [table.rows.contiguous() for table in tables]
    starts = np.cumsum([0, *(r.numel() for r in rows)])
    place = np.empty((len(tables), T - 1), dtype=np.int64)
    for s, table in enumerate(tables):
        which = torch.arange(T - 1) if table.which is None else table.which
        place[s] = starts[s] + (which.numpy() * rows[s][0].numel() if len(rows[s]) > 1 else 0)
    between = [r[0, 0].numel() if r.shape[1] > 1 else 0 for r in rows]
    flat = torch.cat([r.reshape(-1) for r in rows])
    gamma, counts = torch.empty_like(likelihood), torch.zeros_like(flat)
    log_p = likelihood.new_empty(B)
    own = moves.runs
    compiled(
        likelihood.numpy(),
        flat.numpy(),
        place,
        np.array(between, dtype=np.int64),
        _weights(tables, likelihood).numpy(),
        own.runs,
        own.begins,
        own.kinds,
        own.inner,
        own.sizes,
        gamma.numpy(),
        counts.numpy(),
        log_p.numpy(),
    )
    each = counts.mul_(flat).split([r.numel() for r in rows])
    shaped = (c.reshape(r.shape) for c, r in zip(each, rows, strict=True))
    return Smoothed(gamma, tuple(shaped), _total(log_p, often))


def _total(log_p: Tensor, often: Tensor | None) -> Tensor:
    return log_p.sum() if often is None else torch.dot(log_p, often)


def _weights(tables: Sequence[Table], like: Tensor) -> Tensor:
    """# (S, B or 1, T - 1 or 1)"""
    each = [like.new_ones(1, 1) if t.weight is None else t.weight.to(like) for t in tables]
    return torch.stack(torch.broadcast_tensors(*each)).contiguous()


def _joint(moves: Moves, tables: Sequence[Table], labels: Sequence[Label]) -> Tensor:
    """The product of all tables, at every move where they differ. # (T - 1 or 1, B or 1, *labels)"""
    total: Tensor | None = None
    for stage, table in zip(moves.stages, tables, strict=True):
        rows = table.rows if table.which is None else table.rows[table.which]
        own = moves.shape(stage.table)
        shape = [own[stage.table.index(v)] if v in stage.table else 1 for v in labels]
        rows = rows.reshape(*rows.shape[:2], *shape)
        total = rows if total is None else total * rows
    assert total is not None
    return total.expand(*total.shape[:2], *moves.shape(labels))


def _matrices(moves: Moves, tables: Sequence[Table]) -> Tensor:
    """The matrices of whole moves. # (T - 1 or 1, B or 1, P, P)"""
    labels, starts, ends = moves.places
    joint = _joint(moves, tables, labels).flatten(2)
    out = joint.new_zeros(*joint.shape[:2], moves.P * moves.P)
    out[..., (starts * moves.P + ends).to(joint.device)] = joint
    return out.unflatten(-1, (moves.P, moves.P))


def _cells_of(moves: Moves, xi: Tensor) -> list[Tensor]:
    """Expected counts of each stage's cells from those of whole moves. # (T - 1 or 1, B, *labels)"""
    labels, starts, ends = moves.places
    joint = xi.flatten(2)[..., (starts * moves.P + ends).to(xi.device)]
    joint = joint.reshape(*xi.shape[:2], *moves.shape(labels))
    out = []
    for stage in moves.stages:
        axes = [2 + d for d, label in enumerate(labels) if label not in stage.table]
        out.append(joint.sum(axes) if axes else joint)
    return out


def _of_matrices(
    moves: Moves, likelihood: Tensor, tables: Sequence[Table], often: Tensor | None
) -> Smoothed | None:
    """All steps together; None where mass that may matter nearly underflows."""
    T = likelihood.shape[1]
    A = _matrices(moves, tables)
    A = A.expand(T - 1, *A.shape[1:])
    largest = A.amax((-2, -1), keepdim=True).clamp(min=1e-300)
    found = varying_neighbours(likelihood.transpose(0, 1), A / largest)
    if found is None:
        return None
    gamma, xi, log_c = found
    log_p = log_c + largest.log().sum((0, 2, 3))
    counts = [
        _summed(cells, table) for cells, table in zip(_cells_of(moves, xi), tables, strict=True)
    ]
    return Smoothed(gamma.transpose(0, 1), tuple(counts), _total(log_p, often))


def _summed(cells: Tensor, table: Table) -> Tensor:
    """Counts of all moves as the rows of a table have them.

    Args:
        cells: # (T - 1, B, *labels)
        table: The table.
    """
    more = (1,) * (cells.dim() - 2)
    if table.weight is not None:
        weight = table.weight.T.to(cells)
        cells = cells * weight.reshape(*weight.shape, *more)
    if table.rows.shape[1] == 1:
        cells = cells.sum(1, keepdim=True)
    if table.which is None:
        return cells if len(table.rows) > 1 else cells.sum(0, keepdim=True)
    out = cells.new_zeros(len(table.rows), *cells.shape[1:])
    return out.index_add_(0, table.which.to(cells.device), cells)


def _step_by_step(
    moves: Moves, likelihood: Tensor, tables: Sequence[Table], often: Tensor | None
) -> Smoothed:
    """One step after the other for all sequences, then the counts of many steps at once."""
    B, T, P = likelihood.shape
    names = _letters(moves)
    state = moves.shape(moves.state)
    rules = [
        tuple("".join(names[v] for v in own) for own in (s.before, s.table, s.after))
        for s in moves.stages
    ]
    picked = [t.rows if t.which is None else t.rows[t.which] for t in tables]
    likelihood = likelihood.transpose(0, 1).contiguous()

    def now(s: int, t: int) -> Tensor:
        rows = picked[s]
        return rows[t if len(rows) > 1 else 0]

    alpha, beta, norm = (
        torch.empty_like(likelihood),
        torch.empty_like(likelihood),
        likelihood.new_empty(T, B, 1),
    )
    message = likelihood[0]
    for t in range(T):
        if t:
            x = message.reshape(B, *moves.shape(moves.stages[0].before))
            for s, (before, table, after) in enumerate(rules):
                x = torch.einsum(f"...{before},...{table}->...{after}", x, now(s, t - 1))
            message = x.reshape(B, P) * likelihood[t]
        torch.sum(message, -1, keepdim=True, out=norm[t])
        message = torch.div(message, norm[t], out=alpha[t])
    beta[-1] = 1.0
    for t in range(T - 1, 0, -1):
        w = (beta[t] * likelihood[t] / norm[t]).reshape(B, *state)
        for s in range(len(rules) - 1, -1, -1):
            before, table, after = rules[s]
            w = torch.einsum(f"...{after},...{table}->...{before}", w, now(s, t - 1))
        beta[t - 1] = w.reshape(B, P)
    counts = [torch.zeros_like(table.rows) for table in tables]
    size = max(_AT_ONCE // (B * P), 1)
    for begin in range(0, T - 1, size):
        end = min(begin + size, T - 1)
        many = [r[begin:end] if len(r) > 1 else r for r in picked]
        x = alpha[begin:end].reshape(-1, B, *moves.shape(moves.stages[0].before))
        xs = [x]
        for (before, table, after), rows in zip(rules[:-1], many, strict=False):
            xs.append(torch.einsum(f"...{before},...{table}->...{after}", xs[-1], rows))
        later = slice(begin + 1, end + 1)
        w = (beta[later] * likelihood[later] / norm[later]).reshape(-1, B, *state)
        for s in range(len(rules) - 1, -1, -1):
            before, table, after = rules[s]
            _add(counts[s], tables[s], (before, table, after), xs[s], w, slice(begin, end))
            w = torch.einsum(f"...{after},...{table}->...{before}", w, many[s])
    mass = alpha * beta
    gamma = mass / mass.sum(-1, keepdim=True)
    log_p = torch.where(norm > 1e-150, norm, torch.nan).log().sum((0, 2))
    found = (c.mul_(table.rows) for c, table in zip(counts, tables, strict=True))
    return Smoothed(gamma.transpose(0, 1), tuple(found), _total(log_p, often))


def _add(
    counts: Tensor, table: Table, rule: tuple[str, ...], x: Tensor, w: Tensor, moves: slice
) -> None:
    """Add Σ x w of some moves, one after the other. x and w: # (moves, B, *labels)"""
    before, own, after = rule
    if table.weight is not None:
        weight = table.weight.T.to(x)
        weight = weight[moves] if len(weight) > 1 else weight
        x = x * weight.reshape(*weight.shape, *(1,) * (x.dim() - 2))
    sequences = "" if counts.shape[1] == 1 else "Y"
    if table.which is None and len(counts) == 1:
        found = torch.einsum(f"XY{before},XY{after}->{sequences}{own}", x, w)
        counts += found.reshape(1, *counts.shape[1:])
        return
    found = torch.einsum(f"XY{before},XY{after}->X{sequences}{own}", x, w)
    found = found.reshape(-1, *counts.shape[1:])
    if table.which is None:
        counts[moves] += found
    else:
        counts.index_add_(0, table.which[moves].to(found.device), found)


def _letters(moves: Moves) -> Mapping[Label, str]:
    """A letter for each label, for sums of products."""
    labels = moves.places[0]
    return {label: chr(ord("a") + i) for i, label in enumerate(labels)}
