"""Messages that move in stages, against sums over all paths of the whole state."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pyro_em.posteriors.messages import forward_backward
from pyro_em.posteriors.messages import smooth_moves as ways
from pyro_em.posteriors.messages.moves import Label, Moves
from pyro_em.posteriors.messages.smooth_moves import Smoothed, Table, smooth_moves

LABELS: dict[str, tuple[tuple[int, ...], tuple[int, ...], list[set[Label]]]] = {
    "one latent": ((3,), (1,), [{(0, 1), (0, 0)}]),
    "two chains": ((2, 3), (1, 1), [{(0, 1), (0, 0)}, {(1, 1), (1, 0)}]),
    "history 2": ((2,), (2,), [{(0, 2), (0, 1), (0, 0)}]),
    "layers": ((2, 2), (1, 1), [{(0, 1), (0, 0)}, {(1, 1), (0, 0), (1, 0)}]),
    "coupled": ((2, 2), (1, 1), [{(0, 1), (1, 1), (0, 0)}, {(0, 1), (1, 1), (1, 0)}]),
    "read by the other": ((2, 2), (1, 1), [{(0, 1), (0, 0)}, {(0, 1), (1, 1), (1, 0)}]),
    "begun anew": ((2, 2), (1, 1), [{(0, 1), (0, 0)}]),
    "three": ((2, 2, 2), (1, 1, 1), [{(0, 1), (0, 0)}, {(0, 1), (1, 1), (2, 1), (1, 0)}]),
    "histories": ((2, 2), (2, 1), [{(0, 2), (0, 1), (0, 0)}, {(1, 1), (0, 1), (1, 0)}]),
}
WAYS: dict[str, Callable[..., Smoothed | None]] = {
    "as chosen": smooth_moves,
    "matrices": ways._of_matrices,
    "step by step": ways._step_by_step,
}
if forward_backward._HAS_NUMBA:
    WAYS["numba"] = ways._by_numba


def by_paths(m: Moves, likelihood: Tensor, tables: list[Table], often: Tensor | None) -> Smoothed:
    """Everything from the sum over all paths, with the matrix of each move multiplied out."""
    B, T, P = likelihood.shape
    before, after = m.stages[0].before, m.state
    labels = sorted({*before, *after}.union(*(s.table for s in m.stages)))
    gamma = torch.zeros_like(likelihood)
    counts = [torch.zeros_like(t.rows) for t in tables]
    total = torch.zeros((), dtype=torch.float64)
    values = {
        state: dict(zip(after, v, strict=True))
        for state, v in enumerate(itertools.product(*(range(n) for n in m.shape(after))))
    }

    def cell(s: int, t: int, b: int, i: int, j: int) -> tuple[int, ...] | None:
        read = {(c, lag + 1): v for (c, lag), v in values[i].items()}
        if any(read.get(label, v) != v for label, v in values[j].items()):
            return None
        read |= values[j]
        which, rows = tables[s].which, tables[s].rows
        row = 0 if len(rows) == 1 else t if which is None else int(which[t])
        return (row, b if rows.shape[1] > 1 else 0, *(read[v] for v in m.stages[s].table))

    assert labels
    for b in range(B):
        found = []
        for path in itertools.product(range(P), repeat=T):
            p, cells = likelihood[b, 0, path[0]], []
            for t, (i, j) in enumerate(itertools.pairwise(path)):
                now = [(s, t, cell(s, t, b, i, j)) for s in range(len(tables))]
                if any(place is None for _, _, place in now):
                    break
                p = p * likelihood[b, t + 1, j]
                for s, _, place in now:
                    p = p * tables[s].rows[place]
                cells += now
            else:
                found.append((path, p, cells))
        mass = torch.stack([p for _, p, _ in found]).sum()
        total = total + (1.0 if often is None else often[b]) * mass.log()
        for path, p, cells in found:
            for t, state in enumerate(path):
                gamma[b, t, state] += p / mass
            for s, t, place in cells:
                weight = tables[s].weight
                w = 1.0 if weight is None else weight[b % len(weight), t % weight.shape[1]]
                counts[s][place] += w * p / mass
    return Smoothed(gamma, tuple(counts), total)


def tables_of(m: Moves, T: int, B: int, kind: str, generator: torch.Generator) -> list[Table]:
    out = []
    shared = torch.rand(B, 1, generator=generator, dtype=torch.float64)
    for stage in m.stages:
        rows = {"equal": 1, "each": T - 1, "some": 2}.get(kind, 1)
        own = B if kind == "each" else 1
        numbers = torch.rand(
            rows, own, *m.shape(stage.table), generator=generator, dtype=torch.float64
        )
        weight = torch.rand(B, T - 1, generator=generator, dtype=torch.float64)
        which = torch.tensor([1, *[0] * (T - 2)]) if kind == "some" else None
        weight = shared if kind == "equal" else weight
        out.append(Table(numbers, which, None if kind == "each" else weight))
    return out


@pytest.mark.parametrize("name", LABELS)
def test_every_way_is_the_sum_over_paths(name: str) -> None:
    m = Moves.of(*LABELS[name])
    generator = torch.Generator().manual_seed(0)
    T, B = (4, 2) if m.P <= 3 else (3, 2)
    for kind in ("equal", "each", "some") if m.P < 8 else ("each",):
        likelihood = torch.rand(B, T, m.P, generator=generator, dtype=torch.float64)
        tables = tables_of(m, T, B, kind, generator)
        often = None if kind == "each" else torch.tensor([2.0, 0.5], dtype=torch.float64)
        expected = by_paths(m, likelihood, tables, often)
        for way in WAYS.values():
            got = way(m, likelihood, tables, often)
            assert got is not None
            torch.testing.assert_close(got.gamma, expected.gamma, rtol=1e-11, atol=1e-13)
            torch.testing.assert_close(got.log_evidence, expected.log_evidence)
            for ours, theirs in zip(got.counts, expected.counts, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def test_long_ways_agree() -> None:
    """Where messages are normalised: all ways of many steps, and a step without mass."""
    generator = torch.Generator().manual_seed(1)
    for name in ("two chains", "history 2"):
        m = Moves.of(*LABELS[name])
        likelihood = torch.rand(3, 130, m.P, generator=generator, dtype=torch.float64)
        tables = tables_of(m, 130, 3, "some", generator)
        found = [way(m, likelihood, tables, None) for way in WAYS.values()]
        for got in found:
            assert got is not None and found[0] is not None
            torch.testing.assert_close(got.gamma, found[0].gamma, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(got.log_evidence, found[0].log_evidence)
            for ours, theirs in zip(got.counts, found[0].counts, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
        likelihood[1, 7] *= 1e-200
        for way in WAYS.values():
            lost = way(m, likelihood, tables, None)
            assert lost is None or bool(torch.isnan(lost.log_evidence))


def test_stages_are_as_few_products_as_there_can_be() -> None:
    assert Moves.of((8, 8), (1, 1), LABELS["two chains"][2]).cells == 2 * 8 * 64
    assert Moves.of((5,), (2,), LABELS["history 2"][2]).cells == 5**3
    assert Moves.of((4, 6), (1, 1), LABELS["layers"][2]).cells == 4 * 4 * 6 + 4 * 6 * 6
