"""What runs of a model free is given back beside large data, and not looked at beside small ones."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_em import ExactPosteriorEM
from pyro_em.incomplete import patterns_of
from pyro_em.tracing import freed


@pytest.mark.parametrize("limit, is_asked", [(1, True), (2**20, False)])
def test_freed_memory_is_given_back_beside_large_data(limit, is_asked, monkeypatch):
    asked = []
    monkeypatch.setattr(freed, "_MANY", limit)
    monkeypatch.setattr(freed, "_trim", lambda: asked.append)

    def model(x):
        mu = pyro.param("mu", torch.tensor([-1.0, 2.0]))
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x)

    ExactPosteriorEM(model).fit(torch.linspace(-2, 3, 12), max_steps=2, tol=0)
    assert bool(asked) == is_asked


@pytest.mark.parametrize("rows", [5, 40, 1000])
def test_patterns_are_the_distinct_rows(rows):
    seen = torch.rand(rows, 4, generator=torch.Generator().manual_seed(rows)) < 0.6
    found = patterns_of(seen)
    assert torch.equal(found.seen[found.of_row], seen)
    assert len(found.seen) == len({tuple(row) for row in seen.tolist()})
    codes = (found.seen * torch.tensor([1, 2, 4, 8])).sum(1)
    assert (codes.diff() > 0).all()
