"""Distinct rows, against a dictionary of tuples."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pyro_em.posteriors.mixtures.equal_rows import equal_rows

G = torch.Generator().manual_seed(0)


def whole(n: int, d: int, low: int, high: int) -> Tensor:
    return torch.randint(low, high, (n, d), generator=G).to(torch.float64)


CASES = {
    "few values": whole(200, 3, 0, 2),
    "negative": whole(60, 2, -3, 4),
    "wide": whole(50, 2, -(10**9), 10**9).repeat(2, 1),
    "very wide": whole(40, 3, -(2**52), 2**52).repeat(3, 1),
    "many columns": whole(30, 90, 0, 3).repeat(2, 1),
    "one row": whole(1, 4, 0, 9),
    "one value": torch.zeros(7, 2, dtype=torch.float64),
    "real": torch.randn(20, 2, generator=G, dtype=torch.float64).repeat(2, 1),
    "infinite": torch.tensor([[math.inf, 1.0], [0.0, 1.0], [math.inf, 1.0]], dtype=torch.float64),
    "huge": torch.tensor([[1e300], [0.0], [-1e300], [0.0]], dtype=torch.float64),
    "minus zero": torch.tensor([[0.0], [-0.0], [1.0]], dtype=torch.float64),
}


@pytest.mark.parametrize("case", CASES)
def test_distinct_rows(case: str) -> None:
    rows = CASES[case]
    tuples = [tuple(0.0 if v == 0 else v for v in row) for row in rows.tolist()]
    order = {row: i for i, row in enumerate(sorted(set(tuples)))}
    inverse, counts = equal_rows(rows)
    assert inverse.tolist() == [order[row] for row in tuples]
    assert counts.tolist() == [tuples.count(row) for row in order]
