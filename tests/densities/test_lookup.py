"""Rows that are looked up: each has one feature, which is one, or is masked and has none."""

from __future__ import annotations

import pytest
import torch

from pyro_em.densities.features import Counted, as_lookup

ROWS = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]).double()
COLUMNS = torch.arange(6).reshape(2, 3)


def part(rows: torch.Tensor) -> Counted:
    return Counted(rows.T, COLUMNS, torch.zeros(len(rows), dtype=torch.float64))


def test_symbols_are_found() -> None:
    found = as_lookup(part(ROWS))
    assert found is not None
    assert found.index.tolist() == [1, 0, 2, 1] and found.often.tolist() == [1, 2, 1]


def test_a_row_without_any_is_masked() -> None:
    rows = ROWS.clone()
    rows[2] = 0
    found = as_lookup(part(rows))
    assert found is not None
    assert found.index.tolist() == [1, 0, 3, 1] and found.often.tolist() == [1, 2, 0, 1]


@pytest.mark.parametrize(
    "row",
    [
        [1, 1, 0],
        [0, 2, 0],
        [0.5, 0.5, 0],
        [0, -1, 0],
        [2, 0, -1],
        [0, torch.nan, 0],
        [1, 0, 1e-300],
    ],
)
def test_other_rows_are_none(row: list[float]) -> None:
    rows = ROWS.clone()
    rows[1] = torch.tensor(row)
    assert as_lookup(part(rows)) is None
