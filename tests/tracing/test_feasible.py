"""Values in place of masked ones."""

from __future__ import annotations

import pyro.distributions as dist
import torch

from pyro_em.tracing.feasible import without_masked_nonsense


def test_values_of_many_rows_that_are_filled_already_are_not_written_again() -> None:
    x = torch.arange(2.0 * 2**14).reshape(-1, 2)
    x[3:9, 1] = torch.nan
    fn, seen = dist.Normal(torch.zeros(2), 1.0).to_event(1), ~x.isnan()
    filled = without_masked_nonsense(fn, x, seen)
    assert torch.equal(filled[3:9, 1], torch.ones(6)) and torch.equal(filled[seen], x[seen])
    assert without_masked_nonsense(fn, filled, seen).data_ptr() == filled.data_ptr()
    other = filled.clone()
    other[8, 1] = 7.0  # of one masked entry another number
    assert torch.equal(without_masked_nonsense(fn, other, seen), filled)
