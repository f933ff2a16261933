"""The row of the data that a finding is about, and its place among all rows."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_em import DataError, ExactPosteriorEM
from pyro_em.errors import of_rows


def rows_first(x: Any, y: Any) -> None:
    mu = pyro.param("mu", torch.tensor([-1.0, 1.0]))
    with pyro.plate("rows", len(x), dim=-2):
        z = pyro.sample("z", dist.Bernoulli(0.5)).long()
        with pyro.plate("columns", 3, dim=-1):
            pyro.sample("x", dist.Normal(mu[z].unsqueeze(-1) + y, 1.0).to_event(1), obs=x)


def rows_last(x: Any, y: Any) -> None:
    mu = pyro.param("mu", torch.tensor([-1.0, 1.0]))
    with pyro.plate("rows", x.shape[1], dim=-1):
        z = pyro.sample("z", dist.Bernoulli(0.5)).long()
        with pyro.plate("columns", 3, dim=-2):
            pyro.sample("x", dist.Normal(mu[z].unsqueeze(-1) + y, 1.0).to_event(1), obs=x)


@pytest.mark.parametrize(("model", "place"), [(rows_first, 0), (rows_last, 1)])
@pytest.mark.parametrize("what", ["x", "y"])
def test_a_finding_knows_its_row(model: Any, place: int, what: str) -> None:
    shape = (5, 3) if place == 0 else (3, 5)
    x, y = torch.zeros(*shape, 2), torch.zeros(*shape, 2)
    bad = [2, 1]
    bad[place] = 4
    (x if what == "x" else y)[bad[0], bad[1]] = torch.nan
    missing = "nan" if what == "y" else None
    with pytest.raises(DataError) as raised:
        ExactPosteriorEM(model, missing=missing).posterior(x, y)
    assert [p.row for p in raised.value.problems] == [4]
    assert "The first is in row 704 of all data." in str(of_rows(raised.value, 700))


def test_an_error_without_a_row_names_where_its_rows_begin() -> None:
    other = of_rows(DataError("site 'x': it is impossible."), 30)
    assert isinstance(other, DataError) and str(other).startswith("rows from 30 on: site 'x'")
