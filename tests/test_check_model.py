"""The shipped conformance suite accepts sound models at the edges of what models do."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import ExactPosteriorEM, ModelError
from pyro_em.testing import check_model


def raters(x: Tensor, seen: Tensor) -> None:
    """Three raters of each item; some ratings are missing."""
    w = pyro.param("w", torch.tensor([0.3, 0.7]), constraint=C.simplex)
    p = pyro.param(
        "p", torch.tensor([[0.2, 0.7], [0.3, 0.8], [0.1, 0.6]]), constraint=C.unit_interval
    )
    with pyro.plate("items", len(x), dim=-2):
        z = pyro.sample("z", dist.Categorical(w))
        with pyro.plate("raters", 3, dim=-1):
            rater = torch.arange(3)
            pyro.sample("x", dist.Bernoulli(p[rater, z]), obs=x, obs_mask=seen)


def test_nan_under_a_mask_is_no_error() -> None:
    x = (torch.rand(8, 3) < 0.5).double()
    seen = torch.rand(8, 3) < 0.7
    check_model(raters, torch.where(seen, x, torch.nan), seen)


def test_a_fit_that_reaches_the_boundary_is_no_error() -> None:
    """A class that no item shows: its share goes to zero."""
    x = torch.ones(6, 3)
    check_model(raters, x, torch.ones(6, 3, dtype=torch.bool), steps=60)


def test_two_findings_at_one_site_are_both_told() -> None:
    def model(x: Tensor) -> None:
        pyro.sample("x", dist.Normal(torch.zeros(4, 7), 1.0), obs=x)

    with pytest.raises(ModelError) as raised:
        ExactPosteriorEM(model).plan(torch.zeros(4, 7))
    assert "dimension -1 (size 7)" in str(raised.value) or "size 7" in str(raised.value)
    assert "size 4" in str(raised.value)
