"""The shipped conformance suite accepts sound models at the edges of what models do."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import ExactPosteriorEM, ModelError, PyroEMError
from pyro_em.testing.models import check_model


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


def test_data_along_the_wrong_plate_are_to_be_laid_along_the_right_one() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("shops", 80, dim=-2):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("x", dist.Normal(torch.tensor([0.0, 1.0])[z], 1.0), obs=x)

    with pytest.raises(PyroEMError) as raised:
        ExactPosteriorEM(model).plan(torch.zeros(80))
    first = str(raised.value).split("- ")[1]
    assert first.startswith("lay the data along plate 'shops' (dim=-2): obs=x.reshape(80, 1)")
    assert "squeeze" not in str(raised.value)
    ExactPosteriorEM(model).plan(torch.zeros(80, 1))  # the remedy works


def test_a_table_in_one_plate_needs_another() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("rows", 5):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("x", dist.Normal(torch.tensor([0.0, 1.0])[z], 1.0), obs=x)

    with pytest.raises(PyroEMError, match="add a plate of size 12 with dim=-1, and give"):
        ExactPosteriorEM(model).plan(torch.zeros(5, 12))


def test_probabilities_without_a_constraint_are_noted() -> None:
    def model(x: Tensor, constraint: C.Constraint) -> None:
        w = pyro.param("w", torch.ones(2) / 2, constraint=constraint)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("x", dist.Normal(torch.tensor([0.0, 1.0])[z], 1.0), obs=x)

    note = "parameter 'w': it has no constraint but is used as probabilities"
    x = torch.zeros(5)
    assert note in str(ExactPosteriorEM(model).plan(x, C.real))
    pyro.clear_param_store()
    assert note not in str(ExactPosteriorEM(model).plan(x, C.simplex))
