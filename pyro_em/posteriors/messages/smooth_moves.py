r"""Smoothing of chains whose states are products, by messages that move in stages.

The expected counts of a stage's cells are

    n_s(cell) = Σ_t Σ x_s(before) a_s(cell) w_{s+1}(after),     w_S = ℓ_t β_t / c_t,

with x going forth through the stages of `pyro_em.posteriors.messages.moves`, and w back. Tables may be
the same at all steps or not. Three ways: compiled loops (numba), products of matrices of the whole
state on two levels (few states), one step after the other for all sequences.

Source: Rabiner (1989), "A tutorial on hidden Markov models", section V.A; Ghahramani and Jordan
(1997), "Factorial hidden Markov models", appendix B, for stages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pyro_em.posteriors.messages import forward_backward
from pyro_em.posteriors.messages.forward_backward import smooth
from pyro_em.posteriors.messages.moves import Label, Moves
from pyro_em.posteriors.messages.varying import varying_neighbours

_DENSE = 16  # what a product in the runs of stages costs more than one with the matrix of a move

_FEW = 256  # states up to which the matrix of a move that all share serves without compiled loops

_FEWER = 32  # the same where each move has its own

_CELLS = 2**26  # numbers of all matrices of whole moves, at most

_AT_ONCE = 2**18  # numbers of messages whose counts are summed at once


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
        each: Of each sequence, where it is known. # (B,)
    """

    gamma: Tensor
    counts: tuple[Tensor, ...]
    log_evidence: Tensor
    each: Tensor | None = None


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
    return smooth_each(moves, likelihood, tables, often)


def smooth_each(
    moves: Moves, likelihood: Tensor, tables: Sequence[Table], often: Tensor | None = None
) -> Smoothed:
    """The same with the log evidence of each sequence; see `smooth_moves`."""
    B, T, P = likelihood.shape
    if forward_backward.compiles(B * T, likelihood.device):
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
    from pyro_em.posteriors.messages.numba_moves import smooth_moves as compiled

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
    return Smoothed(gamma, tuple(shaped), _total(log_p, often), log_p)


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
    return Smoothed(gamma.transpose(0, 1), tuple(counts), _total(log_p, often), log_p)


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
    return Smoothed(gamma.transpose(0, 1), tuple(found), _total(log_p, often), log_p)


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
