"""A latent that a model reads as a number of Python is read all the same."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

from pyro_em import ExactPosteriorEM, ModelError

READ = {
    "float": float,
    "item": lambda n: n.item() * 1.0,
    "a branch": lambda n: 1.0 if n > 0.5 else 0.0,
    "numpy": lambda n: torch.as_tensor(n.numpy() * 1.0),
    "tolist": lambda n: n.tolist() * 1.0,
}


@pytest.fixture(autouse=True)
def new_store():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


def reading(read, prior):
    def model() -> None:
        shift = pyro.param("shift", torch.zeros(()))
        n = pyro.sample("n", prior())
        pyro.sample("x", dist.Normal(read(n) + shift, 0.5), obs=torch.tensor(5.0))

    return model


@pytest.mark.parametrize("read", list(READ))
@pytest.mark.parametrize("prior", [lambda: dist.Poisson(2.0), lambda: dist.Normal(0.0, 1.0)])
def test_it_does_not_integrate_to_one(read, prior):
    em = ExactPosteriorEM(reading(READ[read], prior))
    graph = em.plan().graph
    assert not graph.is_separated("n", "x")
    with pytest.raises(ModelError, match="site 'n'"):
        em.elbo()


def test_a_guide_draws_it_and_learns():
    def guide() -> None:
        rate = pyro.param("rate", torch.tensor(2.0), constraint=constraints.positive)
        pyro.sample("n", dist.Poisson(rate))

    em = ExactPosteriorEM(reading(float, lambda: dist.Poisson(2.0)), guide)
    assert [r.route for r in em.plan().routes] == ["guide"]


def test_what_is_only_looked_at_still_integrates_to_one():
    def model() -> None:
        shift = pyro.param("shift", torch.zeros(()))
        n = pyro.sample("n", dist.Normal(0.0, 1.0))
        assert not torch.isnan(n).item() and float(n) < 1e6
        pyro.sample("x", dist.Normal(shift, 0.5), obs=torch.tensor(5.0))

    found = ExactPosteriorEM(model).elbo().value
    assert found == pytest.approx(dist.Normal(0.0, 0.5).log_prob(torch.tensor(5.0)).item())
