"""Plates and supports whose size is computed from a parameter: a sentence, no stack trace."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

from pyro_em import ExactPosteriorEM, PyroEMWarning

X = torch.randn(10, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
WORDS = "has size 4 in this run of the model and had 5 when it was first looked at"


@pytest.fixture(autouse=True)
def new_store():
    pyro.clear_param_store()


def share():
    return pyro.param("p", torch.tensor([0.52, 0.2]), constraint=constraints.unit_interval)


def plate(x):
    p = share()
    n = int(10 * p[0].item())
    with pyro.plate("n", n):
        z = pyro.sample("z", dist.Bernoulli(p[0] * 0.9 + 0.05))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[:n])


def without_latents(x):
    p = share()
    n = int(10 * p[0].item())
    with pyro.plate("n", n):
        pyro.sample("x", dist.Normal(p[0], 1.0), obs=x[:n])


def support(x):
    p = share()
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2 + int(4 * p[0].item()))))
        pyro.sample("x", dist.Normal(z * p[0], 1.0), obs=x)


@pytest.mark.parametrize("model", [plate, without_latents])
def test_a_plate_of_another_size_is_told(model):
    with pytest.warns(PyroEMWarning, match=f"plate 'n': it {WORDS}"):
        result = ExactPosteriorEM(model).fit(X)
    assert int(10 * result.params["p"][0]) == 5  # the search stays where it can compare


def test_a_support_of_another_size_is_told():
    with pytest.warns(PyroEMWarning, match="site 'z': it has 3 values in this run .* had 4"):
        ExactPosteriorEM(support).fit(X)


def test_a_parameter_that_sizes_a_plate_has_no_closed_form():
    def model(x):
        p = share()
        n = int(10 * p[0].item())
        pyro.sample("coin", dist.Bernoulli(p[0]), obs=torch.tensor(0.0))
        with pyro.plate("n", n):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x[:n])

    with pytest.warns(PyroEMWarning, match=f"plate 'n': it {WORDS}"):
        result = ExactPosteriorEM(model).fit(X)
    assert int(10 * result.params["p"][0]) == 5
    assert "plate" in result.plan.updates["p"].reason
